"""Files as they lie in the storage: encrypted with a key of their own, so that to lose the key is to lose the file.

AES-256-GCM in chunks (the STREAM construction of Hoang et al. 2015, "Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance"): each chunk's nonce has its number and whether it is the last, so that none can be changed, moved,
left out or cut off unseen. Nothing of more than one chunk is ever held.
"""

import hmac
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from service.domain.errors import StorageDamaged
from service.store.storage import Storage, Stored

KEY_BYTES = 32
CHUNK_BYTES = 2**16
TAG_BYTES = 16
PREFIX_BYTES = 7  # of the nonce, random; then four of the chunk's number and one for the last


def new_key() -> bytes:
    return os.urandom(KEY_BYTES)


def sealed(chunks: Iterable[bytes], key: bytes) -> Iterator[bytes]:
    """What is stored: the nonces' prefix, then the chunks, each with its tag."""
    cipher, prefix, number = AESGCM(key), os.urandom(PREFIX_BYTES), 0
    yield prefix
    waiting = b""
    for chunk in chunks:
        waiting += chunk
        while len(waiting) > CHUNK_BYTES:  # one stays behind: the last is marked
            yield cipher.encrypt(_nonce(prefix, number, last=False), waiting[:CHUNK_BYTES], None)
            waiting, number = waiting[CHUNK_BYTES:], number + 1
    yield cipher.encrypt(_nonce(prefix, number, last=True), waiting, None)


def opened(source: IO[bytes], key: bytes) -> Iterator[bytes]:
    """The content again. Raises StorageDamaged where it is not what was sealed."""
    cipher, prefix, number = AESGCM(key), source.read(PREFIX_BYTES), 0
    chunk = source.read(CHUNK_BYTES + TAG_BYTES)
    while True:
        after = source.read(CHUNK_BYTES + TAG_BYTES)
        try:
            yield cipher.decrypt(_nonce(prefix, number, last=not after), chunk, None)
        except (InvalidTag, ValueError) as error:
            raise StorageDamaged("a stored file is damaged, or sealed with another key") from error
        if not after:
            return
        chunk, number = after, number + 1


@contextmanager
def open_sealed(storage: Storage, key: str, data_key: bytes) -> Iterator[IO[bytes]]:
    """A sealed file below the storage root, for reading; iterable by lines. Raises NotFound."""
    with storage.open(key) as source:
        yield io.BufferedReader(_Raw(opened(source, data_key)), CHUNK_BYTES)


class SealedStorage(Storage):
    """A storage all of whose files are sealed with one key."""

    def __init__(self, url: str, data_key: bytes, below: str = "") -> None:
        super().__init__(url, below)
        self._key = data_key

    def alias(self, name: str) -> str:
        """A name for a file that only who has the key can tell the meaning of: 64 hex digits."""
        return hmac.new(self._key, name.encode(), "sha256").hexdigest()

    def write(self, key: str, chunks: Iterable[bytes], max_bytes: int | None = None) -> Stored:
        return super().write(key, sealed(chunks, self._key), max_bytes)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Whole alone: to read a part of it, all before it has to be opened, too."""
        if start or end is not None:
            raise ValueError("a sealed file is read whole")
        with self.open(key) as source:
            yield from self.unsealed(source)

    def unsealed(self, source: IO[bytes]) -> Iterator[bytes]:
        """What was written, from the stored bytes."""
        return opened(source, self._key)


class _Raw(io.RawIOBase):
    """Chunks as a file that is read from its beginning to its end."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        if not self._left:
            self._left = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _nonce(prefix: bytes, number: int, *, last: bool) -> bytes:
    return prefix + number.to_bytes(4, "big") + bytes([last])
