"""What is shown of jobs: lists, the place in the line, events, the series of steps and checks."""

from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import Connection, bindparam, func, select
from sqlalchemy.orm import Session

from service.domain.job import TERMINAL, Status
from service.store import line
from service.store.paging import Order, fetch_page
from service.store.tables import File, Job, JobCheck, JobCheckpoint, JobEvent, JobStep
from service.store.tenancy import EVERYBODYS

ATTEMPT_BEGINS = "job.started"
ATTEMPT_ENDS = {  # event -> the attempt's outcome
    "attempt.lost": "lost",
    "attempt.requeued": "given_back",
    "job.succeeded": "succeeded",
    "job.failed": "failed",
    "job.cancelled": "cancelled",
}

_place = func.row_number().over(order_by=line.order(Job)).label("place")
_line = select(Job.id, _place).where(line.ready(Job)).subquery()
PLACES = select(_line.c.id, _line.c.place).where(_line.c.id.in_(bindparam("ids", expanding=True)))


def page(
    s: Session,
    *,
    after: str | None = None,
    before: str | None = None,
    limit: int = 20,
    order: Order = "desc",
    status: Status | None = None,
    model: str | None = None,
) -> tuple[Sequence[Job], bool]:
    """(rows, has_more)"""
    rows = select(Job)
    if status is not None:
        rows = rows.where(Job.status == status)
    if model is not None:
        rows = rows.where(Job.model == model)
    return fetch_page(s, rows, Job.id, after=after, before=before, limit=limit, order=order)


def is_empty(s: Session, table: type[Job] | type[File]) -> bool:
    return s.scalar(select(table.id).limit(1)) is None


def statuses(s: Session, job_ids: Collection[str]) -> dict[str, Status]:
    """Of those of the jobs that there are."""
    rows = s.execute(select(Job.id, Job.status).where(Job.id.in_(job_ids)))
    return {row.id: row.status for row in rows}


def places(s: Session | Connection, job_ids: Collection[str]) -> dict[str, int]:
    """1: next, by the order in which jobs are claimed, whoever's and of whatever GPU class. A job that rests has no place."""
    if not job_ids:
        return {}
    return {row.id: row.place for row in s.execute(PLACES, {"ids": list(job_ids)}, execution_options=EVERYBODYS)}


def events(s: Session, job_id: str, after_seq: int = 0, limit: int = 100) -> Sequence[JobEvent]:
    rows = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > after_seq)
    return s.scalars(rows.order_by(JobEvent.seq).limit(limit)).all()


def following(s: Session, job_id: str, after_seq: int, limit: int) -> tuple[Sequence[JobEvent], bool]:
    """(events, whether the job has ended and these are its last)"""
    job = s.execute(select(Job.status, Job.last_seq).where(Job.id == job_id)).one()  # before them: more may come
    found = events(s, job_id, after_seq, limit)
    last = found[-1].seq if found else after_seq
    return found, job.status in TERMINAL and last >= job.last_seq


def attempts(s: Session, job_id: str) -> Sequence[JobEvent]:
    """The events with which attempts begin and end, in order."""
    rows = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type.in_({ATTEMPT_BEGINS, *ATTEMPT_ENDS}))
    return s.scalars(rows.order_by(JobEvent.seq)).all()


def checkpoints(s: Session, job_id: str) -> list[tuple[JobCheckpoint, int]]:
    """Each with the attempt that saved it, the newest first."""
    fence = func.row_number().over(order_by=JobEvent.seq).label("fence")  # each claim takes the next
    starts = select(JobEvent.attempt, fence).where(JobEvent.job_id == job_id, JobEvent.type == ATTEMPT_BEGINS)
    begun = starts.subquery()
    rows = select(JobCheckpoint, begun.c.attempt).join(begun, begun.c.fence == JobCheckpoint.fence)
    rows = rows.where(JobCheckpoint.job_id == job_id)
    found = s.execute(rows.order_by(JobCheckpoint.fence.desc(), JobCheckpoint.step.desc()))
    return [(row, attempt) for row, attempt in found]


def ahead(s: Session, priority: int, due_at: datetime | None) -> int:
    """How many jobs, whoever's and of whatever GPU class, would be claimed before one that came now (see line.order)."""
    waiting = select(func.count()).select_from(Job).where(line.ready(Job), line.before(priority, due_at))
    return s.scalars(waiting, execution_options=EVERYBODYS).one()


def steps(s: Session, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[JobStep]:
    """Of the current attempt, or the last."""
    rows = select(JobStep).join(Job, (Job.id == JobStep.job_id) & (Job.fence == JobStep.fence))
    rows = rows.where(Job.id == job_id, JobStep.step > after)
    return s.scalars(rows.order_by(JobStep.step).limit(limit)).all()


def checks(s: Session, job_id: str) -> Sequence[JobCheck]:
    """Of the current attempt, or the last."""
    rows = select(JobCheck).join(Job, (Job.id == JobCheck.job_id) & (Job.fence == JobCheck.fence))
    return s.scalars(rows.where(Job.id == job_id).order_by(JobCheck.step)).all()
