"""Uploaded sets: the row here, the bytes below the storage root. The caller commits."""

from collections.abc import Collection, Sequence

from sqlalchemy import delete as delete_from
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import TERMINAL
from service.store import benchmarks
from service.store.ids import new_id
from service.store.paging import Order, fetch_page
from service.store.tables import File, Job

FOLDER = "files"  # below the storage root


def new_file_id() -> str:
    """Known before the row, since the bytes are stored first, under `file_key(id)`."""
    return new_id("ufile")


def file_key(file_id: str) -> str:
    return f"{FOLDER}/{file_id}.jsonl"


def insert(s: Session, file_id: str, *, purpose: str, name: str, bytes: int, sha256: str, rows: int) -> File:  # noqa: A002
    file = File(id=file_id, key=file_key(file_id), purpose=purpose, name=name, bytes=bytes, sha256=sha256, rows=rows)
    s.add(file)
    s.flush()
    s.refresh(file)
    return file


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
    """Those of the storage keys that a row names."""
    return set(s.scalars(select(File.key).where(File.key.in_(keys))))


def delete(s: Session, file_id: str) -> str:
    """The storage key to delete once this is committed. Raises InvalidTransition while a job or a benchmark needs the file."""
    # The lock waits for a job or a benchmark that is just being created with this file, and makes a later one find it gone.
    file = s.scalar(select(File).where(File.id == file_id).with_for_update())
    if file is None:
        raise NotFound("file", file_id)
    uses = or_(*(column == file_id for column in (Job.forget_set, Job.retain_set, Job.refusal_set, Job.holdout_set)))
    users = select(Job.id).where(Job.status.not_in(TERMINAL), uses)
    user = s.scalar(users.limit(1))
    if user is not None:
        raise InvalidTransition(f"job {user} still needs file {file_id}")
    if (benchmark := benchmarks.of_file(s, file_id)) is not None:
        raise InvalidTransition(f"benchmark {benchmark!r} still needs file {file_id}")
    s.execute(delete_from(File).where(File.id == file_id))
    return file.key
