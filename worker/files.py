"""Sets in, results out: the runner's dealings with the storage root."""

import hashlib
import io
import json
from base64 import b64decode
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from service.domain import overlap, rows
from service.domain.errors import InvalidRequest, JobFailure, NotFound
from service.domain.job import FailureCode
from service.store.sealed import SealedStorage, open_sealed
from service.store.storage import Storage, Stored
from worker.diary import Diary
from worker.records import ArtifactFile, FileRef

MEDIA_TYPES = {".safetensors": "application/octet-stream", ".json": "application/json", ".md": "text/markdown"}


def sealed_with(url: str, of: Iterable[FileRef], below: str = "") -> SealedStorage:
    """A storage for what models say of these files: who purges one of them has made it noise."""
    keys = sorted(file.data_key for file in of)
    return SealedStorage(url, hashlib.sha256(" ".join(["said of", *keys]).encode()).digest(), below)


def read_set(storage: Storage, file: FileRef) -> list[rows.Example]:
    """The rows of a stored forget, retain, refusal or holdout set."""
    try:
        return rows.read(_lines(storage, file))
    except InvalidRequest as error:
        raise JobFailure(FailureCode.INVALID_FILE, f"file {file.id}: {error}") from error


def read_rows(storage: Storage, file: FileRef) -> list[dict[str, Any]]:
    """The same with all their columns, as the file has them."""
    return [json.loads(line) for line in _lines(storage, file) if line.removeprefix(BOM_UTF8).strip()]


def read_bytes(storage: Storage, file: FileRef) -> bytes:
    """A stored file, refused if it is not the one that the request named."""
    try:
        with open_sealed(storage, file.key, b64decode(file.data_key)) as opened:
            content = opened.read()
    except NotFound as error:
        raise JobFailure(FailureCode.INVALID_FILE, f"file {file.id} is no longer in the storage") from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise JobFailure(FailureCode.INVALID_FILE, f"file {file.id} has changed since it was uploaded")
    return content


def _lines(storage: Storage, file: FileRef) -> Iterator[bytes]:
    """Lines as the upload saw them."""
    return rows.lines(io.BytesIO(read_bytes(storage, file)))


def judge_overlap(sets: Mapping[str, Sequence[rows.Example]], diary: Diary) -> None:
    """Warns of rows of two sets that are much alike.

    Raises JobFailure where a row is in two sets: it is to be forgotten and kept, or was seen and never seen.
    """
    for (one, its), (other, theirs) in combinations(sets.items(), 2):
        found = overlap.overlap(its, theirs)
        if found.same:
            blamed = {one: [row for row, _ in found.same], other: [row for _, row in found.same]}.get("forget", [])
            raise JobFailure(
                FailureCode.FORGET_RETAIN_OVERLAP,
                f"{len(found.same)} rows of the {one} set are also in the {other} set: {overlap.named(found.same)}",
                blamed,
            )
        for code, message in overlap.warnings(one, other, found):
            diary.warn(code, message)


def publish(storage: Storage, prefix: str, folder: Path, under: str) -> list[ArtifactFile]:
    files = []
    for path in sorted(folder.iterdir()):
        key = f"{prefix}/{under}/{path.name}"
        stored = storage.put(key, path)
        media_type = MEDIA_TYPES.get(path.suffix, "application/octet-stream")
        files.append(
            ArtifactFile(
                name=f"{under}/{path.name}", key=key, media_type=media_type, bytes=stored.bytes, sha256=stored.sha256
            )
        )
    return files


def fetch(storage: Storage, files: Sequence[ArtifactFile], folder: Path) -> Path:
    """The published bytes as somebody who downloads them gets them. Raises StorageDamaged where they are others."""
    folder.mkdir()
    for file in files:
        with (folder / Path(file.name).name).open("wb") as target:
            target.writelines(storage.verified(file.key, Stored(file.bytes, file.sha256)))
    return folder


def store_bytes(storage: Storage, prefix: str, name: str, content: bytes, media_type: str) -> ArtifactFile:
    stored = storage.write(f"{prefix}/{name}", [content])
    return ArtifactFile(
        name=name, key=f"{prefix}/{name}", media_type=media_type, bytes=stored.bytes, sha256=stored.sha256
    )
