"""What is stored is encrypted: read back whole, and refused if a byte of it was changed, moved or cut off."""

import io
import os

import pytest

from service.domain.errors import StorageDamaged, StorageUnavailable
from service.store import sealed
from service.store.secrets import SealBroken, Secrets
from service.store.storage import Storage

KEY = bytes(range(32))
CHUNK = sealed.CHUNK_BYTES
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7)


def stored(content: bytes, step: int = 1000) -> bytes:
    chunks = (content[start : start + step] for start in range(0, len(content), step))
    return b"".join(sealed.sealed(chunks, KEY))


def opened(stored: bytes, key: bytes = KEY) -> bytes:
    return b"".join(sealed.opened(io.BytesIO(stored), key))


@pytest.mark.parametrize("size", SIZES)
def test_what_was_sealed_comes_back(size: int) -> None:
    content = os.urandom(size)
    for step in (1000, CHUNK, 10 * CHUNK):
        assert opened(stored(content, step)) == content
    assert content[:64] not in stored(content) or size < 16


def test_nothing_can_be_changed_moved_left_out_or_cut_off() -> None:
    content = os.urandom(2 * CHUNK + 9)
    whole = stored(content)
    part = CHUNK + sealed.TAG_BYTES
    head, first, second, last = whole[:7], whole[7 : 7 + part], whole[7 + part : 7 + 2 * part], whole[7 + 2 * part :]
    for place in (0, 6, 7, 7 + part - 1, 7 + part, len(whole) - 1):
        with pytest.raises(StorageUnavailable):
            opened(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    wrong = (b"", head, head + first, head + first + second, head + second + first + last, head + first + last)
    for altered in (*wrong, whole + b"\0", head + first + second + last[:-1]):
        with pytest.raises(StorageUnavailable):
            opened(altered)
    with pytest.raises(StorageUnavailable):
        opened(whole, bytes(32))


def test_the_same_content_is_stored_in_other_bytes_each_time() -> None:
    assert stored(b"x") != stored(b"x")


def test_a_sealed_file_is_read_by_lines(storage_url: str) -> None:
    storage = Storage(storage_url)
    lines = [f"{number} {'x' * (number % 300)}\n".encode() for number in range(2000)]
    storage.write("f", sealed.sealed(iter(lines), KEY))
    with sealed.open_sealed(storage, "f", KEY) as file:
        assert list(file) == lines


def test_a_sealed_storage_gives_back_what_it_was_given_or_nothing(storage_url: str) -> None:
    storage, content = sealed.SealedStorage(storage_url, KEY, "below"), os.urandom(2 * CHUNK + 9)
    stored = storage.write("f", [content])
    assert b"".join(storage.read("f")) == content
    plain = Storage(storage_url)
    damaged = bytearray(b"".join(plain.read("below/f")))
    assert len(damaged) == stored.bytes
    damaged[CHUNK + 100] ^= 1
    plain.write("below/f", [bytes(damaged)])
    with pytest.raises(StorageDamaged):
        list(storage.read("f"))


def test_a_secret_is_opened_for_the_purpose_that_it_was_sealed_for() -> None:
    secrets = Secrets(KEY)
    kept = secrets.seal("webhook 1", b"s3cret")
    assert secrets.open("webhook 1", kept) == b"s3cret"
    assert b"s3cret" not in kept.encode()
    assert kept != secrets.seal("webhook 1", b"s3cret")
    wrong = [(secrets, "webhook 2", kept), (Secrets(bytes(32)), "webhook 1", kept), (secrets, "webhook 1", kept[:-2])]
    for other, purpose, text in wrong:
        with pytest.raises(SealBroken):
            other.open(purpose, text)


def test_digests_differ_by_purpose_and_by_master_key() -> None:
    digests = {Secrets(key).digest(purpose, b"x") for key in (KEY, bytes(32)) for purpose in ("a", "b")}
    assert len(digests) == 4
    assert Secrets(KEY).digest("a", b"x") == Secrets(KEY).digest("a", b"x")
