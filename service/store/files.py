"""Uploaded sets: the row here, the bytes below the storage root, encrypted with a key that is in the row alone.

The caller commits. To purge a file is to lose its key, first; the bytes go after it.
"""

import hashlib
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, NamedTuple

from pydantic import Base64Bytes, BaseModel
from sqlalchemy import Select, SQLColumnExpression, func, literal, or_, select
from sqlalchemy.orm import Session

from service.domain.deletion import CLOSED
from service.domain.errors import Gone, InvalidTransition, NotFound, StorageDamaged, TooLarge
from service.domain.job import TERMINAL
from service.store import audit, benchmarks, idempotency, sealed, tenancy, tenants
from service.store.ids import new_id
from service.store.paging import Order, fetch_page
from service.store.sealed import open_sealed
from service.store.secrets import SealBroken, Secrets
from service.store.storage import Storage
from service.store.tables import DeletionPlan, DeletionRequest, File, Job

FOLDER = "files"  # below the storage root
BY_ID = ("job", "deletion request")  # others have names


class Private(BaseModel):
    """What goes with the file's key when it is purged: none of it is in the database in the clear, nor in its log."""

    data_key: Base64Bytes  # what the bytes are encrypted with
    sha256: str  # of the content: a plain hash of one row can be guessed
    name: str  # as it was uploaded: people put names into names


class Kept(NamedTuple):
    """Bytes that are stored, on their way to a row."""

    file_id: str
    bytes: int
    digest: str  # keyed
    sealed: str  # a Private


def file_key(file_id: str) -> str:
    return f"{FOLDER}/{file_id}.sealed"


def keep(
    storage: Storage,
    secrets: Secrets,
    tenant_id: str,
    name: str,
    chunks: Iterable[bytes],
    max_bytes: int | None = None,
) -> Kept:
    """Encrypts and stores. Raises TooLarge, StorageFull or StorageUnavailable; then nothing is left.

    Args:
        max_bytes: of the content.
    """
    file_id, key = new_id("ufile"), sealed.new_key()
    plain, keyed, size = hashlib.sha256(), secrets.mac(digest_purpose(tenant_id)), 0

    def noted() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            plain.update(chunk)
            keyed.update(chunk)
            size += len(chunk)
            if max_bytes is not None and size > max_bytes:
                raise TooLarge(f"more than {max_bytes} bytes")
            yield chunk

    storage.write(file_key(file_id), sealed.sealed(noted(), key))
    digest = f"hmac-sha256:{keyed.hexdigest()}"
    return Kept(file_id, size, digest, seal(secrets, file_id, key, plain.hexdigest(), name))


def seal(secrets: Secrets, file_id: str, data_key: bytes, sha256: str, name: str) -> str:
    private = Private(data_key=b64encode(data_key), sha256=sha256, name=name)
    return secrets.seal(_purpose(file_id), private.model_dump_json().encode())


def digest_purpose(tenant_id: str) -> str:
    """What a tenant's files and people are digested under: the same file of two tenants has two digests."""
    return f"digests of {tenant_id}"


def insert(s: Session, kept: Kept, *, purpose: str, rows: int) -> File:
    """To be purged when the tenant's rule says so."""
    days = tenants.get(s, tenancy.tenant(s)).keep_files_days
    file = File(
        id=kept.file_id,
        key=file_key(kept.file_id),
        purpose=purpose,
        bytes=kept.bytes,
        digest=kept.digest,
        sealed=kept.sealed,
        rows=rows,
        created_by=tenancy.actor(s),
        purge_at=None if days is None else func.now() + timedelta(days=days),
    )
    s.add(file)
    s.flush()
    s.refresh(file)
    audit.write(s, "file.stored", "file", file.id, {"purpose": purpose, "rows": rows, "digest": file.digest})
    return file


def private(secrets: Secrets, file: File) -> Private:
    """Raises Gone once it is purged, StorageDamaged where its key was altered, or sealed under another MASTER_KEY."""
    if file.sealed is None:
        raise Gone(f"file {file.id} was purged at {file.purged_at:%Y-%m-%d %H:%M:%S} UTC")
    try:
        return Private.model_validate_json(secrets.open(_purpose(file.id), file.sealed))
    except SealBroken as error:
        raise StorageDamaged(str(error)) from error


@contextmanager
def content(storage: Storage, secrets: Secrets, file: File) -> Iterator[IO[bytes]]:
    """For reading; iterable by lines. Raises Gone once it is purged, NotFound where the bytes are missing."""
    with open_sealed(storage, file.key, private(secrets, file).data_key) as opened:
        yield opened


def get(s: Session, file_id: str) -> File:
    file = s.get(File, file_id)
    if file is None:
        raise NotFound("file", file_id)
    return file


def page(
    s: Session, *, after: str | None = None, before: str | None = None, limit: int = 20, order: Order = "desc"
) -> tuple[Sequence[File], bool]:
    """(rows, has_more)"""
    return fetch_page(s, select(File), File.id, after=after, before=before, limit=limit, order=order)


def named(s: Session, keys: Collection[str]) -> set[str]:
    """Those of the storage keys that a row names whose bytes are still to be read."""
    return set(s.scalars(select(File.key).where(File.key.in_(keys), File.purged_at.is_(None))))


def purge(s: Session, file_id: str) -> str:
    """The storage key to delete once this is committed: without the file's own key the bytes are noise already.

    Counts and the keyed digest stay. Raises InvalidTransition while a job, a request, a plan or a benchmark needs the file.
    """
    # The lock waits for a job or a benchmark that is just being created with this file, and makes a later one find it gone.
    file = s.scalar(
        select(File).where(File.id == file_id).with_for_update(), execution_options={"populate_existing": True}
    )
    if file is None:
        raise NotFound("file", file_id)
    if (needed := _needed_by(s, file)) is not None:
        raise InvalidTransition(f"{needed} still needs file {file_id}")
    if file.purged_at is None:
        file.sealed, file.purge_at, file.purged_at = None, None, s.scalars(select(func.now())).one()
        idempotency.withdraw(s, file.tenant_id, f"files/{file.id}")  # it has the name that was just lost
        audit.write(s, "file.purged", "file", file.id, {"digest": file.digest}, tenant_id=file.tenant_id)
    return file.key


def due(s: Session, limit: int = 100) -> Sequence[str]:
    """Ids of files that are to be purged by now and that nobody needs."""
    over = select(File.id).where(File.purged_at.is_(None), File.purge_at < func.now())
    unneeded = [~users.exists() for users in _users(File.id).values()]
    return s.scalars(over.where(*unneeded).order_by(File.purge_at).limit(limit)).all()


def _needed_by(s: Session, file: File) -> str | None:
    for kind, users in _users(literal(file.id)).items():
        if (user := s.scalar(users.limit(1))) is not None:
            return f"{kind} {user if kind in BY_ID else repr(user)}"
    return None


def _users(file_id: SQLColumnExpression[str]) -> dict[str, Select[str]]:
    """Who needs the file, by kind."""
    sets = (Job.forget_set, Job.retain_set, Job.refusal_set, Job.holdout_set)
    planned = (DeletionPlan.job[purpose].astext for purpose in ("retain_set", "refusal_set", "holdout_set"))
    return {
        "job": select(Job.id).where(Job.status.not_in(TERMINAL), or_(*(column == file_id for column in sets))),
        "deletion request": select(DeletionRequest.id).where(
            DeletionRequest.forget_set == file_id, DeletionRequest.status.not_in(CLOSED)
        ),
        "the deletion plan of model": select(DeletionPlan.model).where(or_(*(column == file_id for column in planned))),
        "benchmark": benchmarks.using(file_id),
    }


def _purpose(file_id: str) -> str:
    return f"file {file_id}"
