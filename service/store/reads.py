"""What is shown of jobs: lists, the place in the line, events, the series of steps and checks."""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.domain.job import Status
from service.store.jobs import CLAIM_ORDER
from service.store.paging import Order, fetch_page
from service.store.tables import Job, JobCheck, JobEvent, JobStep


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


def queue_position(s: Session, job: Job) -> int | None:
    """1: next, by the order in which jobs are claimed, whatever GPU class they need. None: it does not wait."""
    if job.status is not Status.QUEUED:
        return None
    line = select(Job.id, func.row_number().over(order_by=CLAIM_ORDER).label("place")).where(
        Job.status == Status.QUEUED
    )
    places = line.subquery()
    return s.scalar(select(places.c.place).where(places.c.id == job.id))


def events(s: Session, job_id: str, after_seq: int = 0, limit: int = 100) -> Sequence[JobEvent]:
    rows = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > after_seq)
    return s.scalars(rows.order_by(JobEvent.seq).limit(limit)).all()


def steps(s: Session, job_id: str, after: int = 0, limit: int = 1000) -> Sequence[JobStep]:
    """Of the current attempt, or the last."""
    rows = select(JobStep).join(Job, (Job.id == JobStep.job_id) & (Job.fence == JobStep.fence))
    rows = rows.where(Job.id == job_id, JobStep.step > after)
    return s.scalars(rows.order_by(JobStep.step).limit(limit)).all()


def checks(s: Session, job_id: str) -> Sequence[JobCheck]:
    """Of the current attempt, or the last."""
    rows = select(JobCheck).join(Job, (Job.id == JobCheck.job_id) & (Job.fence == JobCheck.fence))
    return s.scalars(rows.where(Job.id == job_id).order_by(JobCheck.step)).all()
