"""What is stored and nobody needs: uploads that were cut off, files that a job's runners left behind."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import groupby

import structlog
from sqlalchemy.orm import Session

from service.domain.job import TERMINAL
from service.store import artifacts, checkpoints, files, reads, tables
from service.store.session import Sessions
from service.store.storage import Storage

ORPHAN_AGE = timedelta(days=1)  # an upload stores its bytes first, and its row a moment later
AT_ONCE = 1000  # keys, or jobs, of one query

log = structlog.get_logger(__name__)


def delete_orphans(sessions: Sessions, storage: Storage) -> int:
    """What is stored and nobody needs. How many objects were deleted."""
    with sessions.begin() as s:
        checkpoints.drop_old(s)
    orphans = [*_uploads_cut_off(sessions, storage), *_left_by_jobs(sessions, storage)]
    for key in orphans:
        storage.delete(key)
        log.warning("deleted a stored file that no row names", key=key)
    return len(orphans)


def _uploads_cut_off(sessions: Sessions, storage: Storage) -> Iterator[str]:
    """Between their bytes and their row."""
    old = [key for key, age in storage.ages(files.FOLDER) if age > ORPHAN_AGE]
    for keys in _parts(old):
        with sessions.begin() as s:
            if _is_new(s, tables.File):
                return
            yield from set(keys) - files.named(s, keys)


def _left_by_jobs(sessions: Sessions, storage: Storage) -> Iterator[str]:
    """Below a job's folder: of one that has ended, all that no row names; of one that is not there, what is old."""
    found = sorted(storage.ages(artifacts.FOLDER))
    by_job = {job_id: list(group) for job_id, group in groupby(found, key=lambda one: one[0].split("/")[1])}
    for job_ids in _parts(list(by_job)):
        with sessions.begin() as s:
            if _is_new(s, tables.Job):
                return
            statuses = reads.statuses(s, job_ids)  # before the artifacts, which come in the moment of a job's success
            named = {artifact.key for rows in artifacts.of_jobs(s, job_ids).values() for artifact in rows}
            named |= checkpoints.named(s, job_ids)
        for job_id in job_ids:
            ended = statuses.get(job_id) in TERMINAL
            for key, age in by_job[job_id]:
                if key not in named and (ended or (job_id not in statuses and age > ORPHAN_AGE)):
                    yield key


def _is_new(s: Session, table: type[tables.Job] | type[tables.File]) -> bool:
    """A database that knows of none, beside a storage that has some, was made anew: it must not empty the storage."""
    new = reads.is_empty(s, table)
    if new:
        log.warning("nothing is deleted, since the database is empty", table=table.__tablename__)
    return new


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), AT_ONCE):
        yield names[start : start + AT_ONCE]
