"""The storage root, a folder and a bucket: whole or not at all, digests, limits, keys that stay inside, errors in our words."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
from fsspec.core import url_to_fs

from service.domain.errors import NotFound, StorageDamaged, StorageFull, StorageUnavailable, TooLarge
from service.store.storage import CHUNK_BYTES, Storage, Stored

LARGE = 9 * CHUNK_BYTES  # more than one part of an upload


@pytest.fixture
def storage(storage_url: str) -> Storage:
    return Storage(storage_url)


def everything(storage: Storage) -> list[str]:
    """What lies there, also uploads to a bucket that were never completed."""
    root = f"s3://{storage.root}" if storage.root[0] != "/" else storage.root
    fs, root = url_to_fs(root, use_listings_cache=False)
    found = list(fs.find(root))
    if storage.root[0] != "/":
        bucket = root.partition("/")[0]
        found += [f"{bucket}/{one['Key']}.upload" for one in fs.list_multipart_uploads(bucket)]
    return sorted(name.removeprefix(f"{storage.root}/") for name in found)


def remove_root(storage: Storage) -> None:
    if storage.root[0] == "/":
        shutil.rmtree(storage.root)
    else:
        fs, bucket = url_to_fs(f"s3://{storage.root.partition('/')[0]}")
        fs.rm(bucket, recursive=True)


def until_damage(chunks: Iterator[bytes]) -> bytes:
    """What comes before the error."""
    taken = b""
    try:
        for chunk in chunks:
            taken += chunk
    except StorageDamaged:
        return taken
    raise AssertionError("it was not noticed")


def content(storage: Storage, key: str) -> bytes:
    return b"".join(storage.read(key))


def test_what_is_written_is_read(storage: Storage, tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK_BYTES + 5)
    (tmp_path / "file").write_bytes(data)
    stored = storage.put("jobs/a/adapter.bin", tmp_path / "file")
    assert stored == (len(data), hashlib.sha256(data).hexdigest())
    assert storage.write("jobs/a/empty", []) == (0, hashlib.sha256().hexdigest())
    assert content(storage, "jobs/a/adapter.bin") == data
    assert content(storage, "jobs/a/empty") == b""
    assert b"".join(storage.read("jobs/a/adapter.bin", 7, 2 * CHUNK_BYTES)) == data[7 : 2 * CHUNK_BYTES]
    assert everything(storage) == ["jobs/a/adapter.bin", "jobs/a/empty"]


def test_what_is_larger_than_one_part_of_an_upload(storage: Storage) -> None:
    data = os.urandom(LARGE)
    stored = storage.write("large", [data[:5], data[5:]])
    assert stored == (len(data), hashlib.sha256(data).hexdigest())
    assert content(storage, "large") == data
    assert everything(storage) == ["large"]


def test_what_is_read_whole_is_verified(storage: Storage) -> None:
    for data in (b"", b"x", os.urandom(CHUNK_BYTES), os.urandom(CHUNK_BYTES + 1), os.urandom(3 * CHUNK_BYTES)):
        stored = storage.write("key", [data])
        assert b"".join(storage.verified("key", stored)) == data
        for altered in (data + b"x", data[:-1] or b"y", data[:-1] + bytes([data[-1] ^ 1]) if data else b"z"):
            storage.write("key", [altered])
            assert len(until_damage(storage.verified("key", stored))) < max(len(data), 1), "never as much as the whole"
    with pytest.raises(NotFound):
        next(storage.verified("nothing", Stored(1, "0" * 64)))


def test_a_storage_below_another_sees_its_own(storage: Storage, storage_url: str) -> None:
    below = Storage(storage_url, "benchmarks/b")
    below.write("a/key", [b"x"])
    assert everything(storage) == ["benchmarks/b/a/key"]
    assert [key for key, _ in below.ages("a")] == ["a/key"]
    assert content(below, "a/key") == content(storage, "benchmarks/b/a/key") == b"x"


def test_delete_is_idempotent_and_takes_what_is_below(storage: Storage) -> None:
    for key in ("jobs/a/attempts/1/x", "jobs/a/attempts/1/y/z", "jobs/a/attempts/10/x"):
        storage.write(key, [b"."])
    storage.delete("jobs/a/attempts/1")
    storage.delete("jobs/a/attempts/1")
    assert everything(storage) == ["jobs/a/attempts/10/x"]
    storage.delete("jobs/a/attempts/10/x")
    assert everything(storage) == []


def test_what_others_write_and_delete_is_seen_at_once(storage: Storage, storage_url: str) -> None:
    type(storage._place.fs).clear_instance_cache()  # what another process has is not ours
    other = Storage(storage_url)
    assert other._place.fs is not storage._place.fs
    assert list(storage.ages("jobs")) == []
    other.write("jobs/key", [b"old"])
    assert [key for key, _ in storage.ages("jobs")] == ["jobs/key"]
    assert content(storage, "jobs/key") == b"old"
    other.write("jobs/key", [b"newer"])
    assert content(storage, "jobs/key") == b"newer"
    other.delete("jobs")
    with pytest.raises(NotFound):
        content(storage, "jobs/key")


def test_the_age_is_since_the_last_write(storage: Storage) -> None:
    storage.write("jobs/key", [b"x"])
    ((key, age),) = storage.ages("jobs")
    assert key == "jobs/key"
    assert timedelta(seconds=-1) < age < timedelta(minutes=2)


def test_a_file_over_the_limit_leaves_nothing(storage: Storage) -> None:
    assert storage.write("exact", [b"12345", b"67890"], max_bytes=10).bytes == 10
    taken = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield b"12345"

    with pytest.raises(TooLarge, match="10 bytes"):
        storage.write("over", endless(), max_bytes=10)
    assert len(taken) == 3  # the rest was not even read
    assert everything(storage) == ["exact"]


def test_a_reader_sees_the_old_or_the_new_bytes_never_half(storage: Storage) -> None:
    storage.write("key", [b"old"])

    def chunks() -> Iterator[bytes]:
        yield b"n" * LARGE
        assert content(storage, "key") == b"old"
        yield b"ew"

    storage.write("key", chunks())
    assert content(storage, "key") == b"n" * LARGE + b"ew"


def test_of_two_writers_of_one_key_one_is_seen_whole(storage: Storage, storage_url: str) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a" * LARGE
        storage.write("key", [b"b" * LARGE, b"b"])
        assert content(storage, "key") == b"b" * (LARGE + 1)
        yield b"a"

    storage.write("key", chunks())
    assert content(storage, "key") == b"a" * (LARGE + 1)

    def write(letter: bytes) -> None:
        own = Storage(storage_url)
        for _ in range(5):
            own.write("key", [letter * 1000] * 10)

    threads = [Thread(target=write, args=[letter]) for letter in (b"c", b"d", b"e")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with suppress(StorageUnavailable):  # in a bucket, of an object that is replaced while it is read
            assert len(set(content(storage, "key"))) == 1
    for thread in threads:
        thread.join()
    assert content(storage, "key") in [letter * 10_000 for letter in (b"c", b"d", b"e")]
    assert everything(storage) == ["key"]


@pytest.mark.parametrize("size", [3, LARGE])
def test_a_source_that_breaks_leaves_what_was(storage: Storage, size: int) -> None:
    storage.write("key", [b"old"])

    def chunks() -> Iterator[bytes]:
        yield b"n" * size
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write("key", chunks())
    assert everything(storage) == ["key"]
    assert content(storage, "key") == b"old"


def test_what_a_killed_writer_leaves_is_not_seen_and_can_be_deleted(storage: Storage, storage_url: str) -> None:
    code = (
        "import sys, time; from service.store.storage import Storage\n"
        f"def chunks(): yield bytes({LARGE}); print('half', flush=True); time.sleep(60)\n"
        "Storage(sys.argv[1]).write('jobs/key', chunks())"
    )
    with subprocess.Popen([sys.executable, "-c", code, storage_url], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    with pytest.raises(NotFound):
        content(storage, "jobs/key")
    (left,) = everything(storage)
    ((half, _),) = storage.ages("jobs")
    assert half.startswith(left.removesuffix(".upload")), "the sweep finds it"
    storage.write("jobs/key", [b"whole"])
    storage.delete(half)
    assert everything(storage) == ["jobs/key"], "and tells it from what is there under its key"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "..",
        "../up",
        "a/../b",
        "a/./b",
        "a//b",
        "a/",
        ".hidden",
        "a\\b",
        "a\0b",
        "a*",
        "s3://b/c",
        "a b",
        "ä",
        "a\n",
    ],
)
def test_a_key_stays_below_the_root(key: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for use in (lambda: storage.write(key, [b""]), lambda: storage.delete(key), lambda: list(storage.ages(key))):
        with pytest.raises(ValueError, match="not a storage key"):
            use()
    with pytest.raises(ValueError, match="not a storage key"), storage.open(key):
        pass


def test_a_root_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="folder, or s3://"):
        Storage("memory://x")


def test_what_is_missing_is_not_found(storage: Storage) -> None:
    with pytest.raises(NotFound, match="nothing"):
        next(storage.read("nothing"))


# --- what the outside world does


@pytest.mark.parametrize("size", [3, LARGE])
def test_a_root_that_vanishes_is_a_failure_of_the_storage_and_not_made_anew(storage: Storage, size: int) -> None:
    storage.write("jobs/key", [b"x"])

    def chunks() -> Iterator[bytes]:
        yield b"n" * size
        remove_root(storage)
        yield b"ew"

    uses: list[Callable[[], object]] = [
        lambda: storage.write("jobs/new", chunks()),
        lambda: storage.write("jobs/new", [b"x"]),
        lambda: content(storage, "jobs/key"),
        lambda: list(storage.verified("jobs/key", Stored(1, "0" * 64))),
        lambda: list(storage.ages("jobs")),
        lambda: storage.delete("jobs"),
    ]
    for use in uses:
        with pytest.raises(StorageUnavailable, match="root of the storage is gone"):
            use()
    assert not Path(storage.root).exists()


def test_a_folder_is_made_where_that_is_asked_for(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "a" / "root"))
    with pytest.raises(StorageUnavailable):
        storage.write("key", [b"x"])
    storage.create()
    storage.create()
    storage.write("key", [b"x"])
    assert everything(storage) == ["key"]


def test_a_full_disk(tmp_path: Path) -> None:
    """The kernel's own limit on the size of a file, in a process of its own."""
    storage = Storage(str(tmp_path))
    storage.write("key", [b"old"])
    code = (
        "import resource, sys; from service.domain.errors import StorageFull; from service.store.storage import Storage\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({CHUNK_BYTES}, {CHUNK_BYTES}))\n"
        f"try: Storage(sys.argv[1]).write('key', [bytes({CHUNK_BYTES})] * 3)\n"
        "except StorageFull: sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 7
    assert everything(storage) == ["key"]
    assert content(storage, "key") == b"old"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EIO, StorageUnavailable),
        (errno.EACCES, StorageUnavailable),
    ],
)
def test_errors_of_the_disk(
    code: int, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk tells late: when it is asked to keep what it took."""

    def broken(_: int) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path))

    storage = Storage(str(tmp_path))
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(expected) as caught:
        storage.write("key", [b"x"])
    assert str(tmp_path) not in str(caught.value)  # a path of our machine is nobody's business
    assert everything(storage) == []


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("not a folder")
    storage = Storage(str(tmp_path / "root"))
    with pytest.raises(StorageUnavailable):
        storage.write("key", [b"x"])
    with pytest.raises(StorageUnavailable):
        storage.create()


def test_the_runner_gets_no_database_with_it_and_without_a_bucket_no_client_of_one() -> None:
    code = (
        "import sys; from service.store.storage import Storage; Storage('.')\n"
        "sys.exit(bool({'sqlalchemy', 's3fs'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
