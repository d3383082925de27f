"""Files and artifacts below one fsspec root: a folder, or a bucket. No database here: the runner uses it too.

Bytes appear under their key whole or not at all.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import IO, NamedTuple

from fsspec.core import split_protocol

from service.domain.errors import NotFound, StorageDamaged, StorageFull, StorageUnavailable, TooLarge, UnlearnError
from service.store.place import Place, folder

CHUNK_BYTES = 2**20
KEY = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*"
)  # no part begins with a dot: no "..", no "."
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_CODES = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}  # of Ceph, and of MinIO


class Stored(NamedTuple):
    bytes: int
    sha256: str  # 64 hex digits


class Storage:
    """`url`: a folder, or "s3://bucket/prefix"; `below`: a folder in it, of plain parts, that all keys are in.

    Every method raises ValueError for a key that is not plain (letters, digits, "._-", parts joined by "/"), StorageFull
    when the disk or the quota is exhausted, StorageUnavailable for other errors of the outside world: also for a root that
    is gone, which is never made anew. (The mount point of a volume that is not mounted is not gone: it is an empty root.)
    """

    def __init__(self, url: str, below: str = "") -> None:
        self._place = _place(url)
        self.root = "/".join(part for part in (self._place.root.rstrip("/"), below) if part)

    def create(self) -> None:
        """The root, if it is a folder that is not there yet. A bucket is the operator's to make."""
        with self._outside(absent=None):
            self._place.create()

    def write(self, key: str, chunks: Iterable[bytes], max_bytes: int | None = None) -> Stored:
        """Stores the chunks under the key, replacing what was there. Raises TooLarge beyond `max_bytes`; then nothing is left."""
        path = self._path(key)
        lost = StorageUnavailable("the storage lost what was being written")
        with self._outside(absent=lost), self._place.new(path) as file:
            return _copy(chunks, file, max_bytes)

    def put(self, key: str, source: Path) -> Stored:
        """A local file."""
        with source.open("rb") as file:
            return self.write(key, iter(lambda: file.read(CHUNK_BYTES), b""))

    @contextmanager
    def open(self, key: str) -> Iterator[IO[bytes]]:
        """For reading. Raises NotFound."""
        path = self._path(key)
        with self._outside(absent=NotFound("stored file", key)), self._place.fs.open(path, "rb") as file:
            yield file

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes [start, end) in chunks. Raises NotFound with the first chunk."""
        with self.open(key) as file:
            file.seek(start)
            left = None if end is None else end - start
            while chunk := file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)):
                yield chunk
                left = None if left is None else left - len(chunk)

    def verified(self, key: str, expected: Stored) -> Iterator[bytes]:
        """All bytes in chunks, the last of them only once they were found to be what `write` returned that for.

        Raises NotFound, or StorageDamaged in place of the last chunk: nobody takes wrong bytes for the whole.
        """
        held, size, digest = b"", 0, hashlib.sha256()
        for chunk in self.read(key, end=expected.bytes + 1):
            size += len(chunk)
            digest.update(chunk)
            if held and size <= expected.bytes:
                yield held
            held = chunk
        if (size, digest.hexdigest()) != expected:
            raise StorageDamaged("a stored file is not what was written")
        yield held

    def ages(self, prefix: str) -> Iterator[tuple[str, timedelta]]:
        """Keys below the prefix, also half-written ones, and how long ago each was last written."""
        path = self._path(prefix)
        with self._outside(absent=None):
            for name, when in self._place.written(path):
                key = f"{prefix}{name.removeprefix(path)}"
                if KEY.fullmatch(key):
                    yield key, datetime.now(UTC) - when

    def delete(self, key: str) -> None:
        """Gone afterwards, whether or not it was there; a key that is a prefix ("jobs/x") takes along what is below it."""
        path = self._path(key)
        with self._outside(absent=None):
            self._place.remove(path)

    def _path(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(f"not a storage key: {key!r}")
        return f"{self.root}/{key}"

    @contextmanager
    def _outside(self, absent: UnlearnError | None) -> Iterator[None]:
        """Errors of the outside world in our words; `absent`: that of a file that is not there, None if that is none."""
        try:
            try:
                yield
            except FileNotFoundError as error:
                self._place.check()
                if absent is not None:
                    raise absent from error
        except FileNotFoundError as error:
            raise StorageUnavailable("the root of the storage is gone") from error
        except self._place.errors as error:
            if _full(error):
                raise StorageFull("the storage takes no more") from error
            number = getattr(error, "errno", None)  # its own words may name a path, or a bucket
            said = os.strerror(number) if number else type(error).__name__
            raise StorageUnavailable(f"the storage failed: {said}") from error


def _place(url: str) -> Place:
    """Raises ValueError for a root of another kind, ImportError for a bucket without the extra "s3"."""
    match split_protocol(url)[0]:
        case None | "file":
            return folder(url)
        case "s3":
            from service.store.bucket import bucket  # what it needs is not installed everywhere, and slow to import

            return bucket(url)
    raise ValueError("STORAGE_URL is a folder, or s3://bucket/prefix")


def _copy(chunks: Iterable[bytes], file: IO[bytes], max_bytes: int | None) -> Stored:
    size, digest = 0, hashlib.sha256()
    for chunk in chunks:
        size += len(chunk)
        if max_bytes is not None and size > max_bytes:
            raise TooLarge(f"more than {max_bytes} bytes")
        digest.update(chunk)
        file.write(chunk)
    return Stored(size, digest.hexdigest())


def _full(error: Exception) -> bool:
    answer = getattr(error.__cause__, "response", {})  # what the bucket's server said
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return (
        getattr(error, "errno", None) in FULL
        or status == HTTPStatus.INSUFFICIENT_STORAGE
        or answer.get("Error", {}).get("Code") in FULL_CODES
    )
