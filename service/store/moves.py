"""THE transition: nothing else writes a job's status.

A move wants the row locked, asks TRANSITIONS, and is one compare-and-set on (status, fence) with its events in the same
transaction, its row in the audit log, and what webhooks tell of it; the events' `seq` is allocated by that same UPDATE,
so it has no gaps. All times are the database's.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import HELD, TERMINAL, TRANSITIONS, Failure, Status
from service.store import audit, checkpoints, deletion_jobs, outbox
from service.store.ids import new_id
from service.store.metrics import FENCED_WRITES, JOBS_FINISHED, bump
from service.store.rows import Event
from service.store.tables import Job, JobEvent
from service.webhooks.events import EventType, Subject

FRESH: dict[str, Any] = {"populate_existing": True}  # what a lock waited for may have changed the row

TOLD = {  # to a tenant's server
    Status.QUEUED: EventType.JOB_QUEUED,
    Status.RUNNING: EventType.JOB_STARTED,
    Status.PAUSED: EventType.JOB_PAUSED,
    Status.SUCCEEDED: EventType.JOB_SUCCEEDED,
    Status.FAILED: EventType.JOB_FAILED,
    Status.CANCELLED: EventType.JOB_CANCELLED,
}


def locked(s: Session, job_id: str) -> Job:
    job = s.scalar(select(Job).where(Job.id == job_id).with_for_update(), execution_options=FRESH)
    if job is None:
        raise NotFound("job", job_id)
    return job


def held(s: Session, job_id: str, fence: int) -> Job | None:
    """The locked row, if this fence still holds its lease; else a write was refused, and is counted."""
    leased = select(Job).where(Job.id == job_id, Job.fence == fence, Job.status.in_(HELD))
    job = s.scalar(leased.with_for_update(), execution_options=FRESH)
    if job is None:
        bump(s, FENCED_WRITES, {})
    return job


def move(s: Session, job: Job, target: Status, *events: Event, **values: Any) -> Job:
    """`job` must be locked. Raises InvalidTransition if its status does not allow the move."""
    if target not in TRANSITIONS[job.status]:
        raise InvalidTransition(f"the job is {job.status}; it cannot become {target}")
    if job.status in HELD and target not in HELD:
        values |= {"lease_owner": None, "lease_until": None, "beat_at": None}
        values |= {"stage": None, "stage_history": closed(job.stage_history, now(s))}
    if target is not Status.QUEUED:
        values["not_before"] = None  # it rests no longer
    if target in TERMINAL:
        values["finished_at"] = func.now()
        if target is not Status.FAILED:  # that may be tried again, and goes on from there
            checkpoints.drop(s, job.id)
    elif job.status in TERMINAL:
        values |= {"finished_at": None, "failure": None}
    before = job.status
    moved = write(s, job, events, status=target, **values)
    told = {"from": before, "attempt": moved.attempt}
    audit.write(s, f"job.{target}", "unlearning.job", job.id, told, tenant_id=job.tenant_id)
    tell(s, moved)
    if target in TERMINAL or before in TERMINAL:
        deletion_jobs.job_moved(s, moved)
    if target in TERMINAL:
        code = moved.failure["code"] if moved.failure else ""
        bump(s, JOBS_FINISHED, {"status": target, "method": job.method, "failure_code": code})
    return moved


def tell(s: Session, job: Job) -> None:
    """Webhooks tell what the job has just become."""
    if job.status in TOLD:
        outbox.enqueue(s, job.tenant_id, TOLD[job.status], Subject(job.id, "unlearning.job", job.status))


def write(s: Session, job: Job, events: Sequence[Event], **values: Any) -> Job:
    """The one UPDATE, a compare-and-set on (status, fence), with its events."""
    attempt = job.attempt
    written: Job | None = s.scalar(
        update(Job)
        .where(Job.id == job.id, Job.status == job.status, Job.fence == job.fence)
        .values(version=Job.version + 1, updated_at=func.now(), last_seq=Job.last_seq + len(events), **values)
        .returning(Job),
        execution_options=FRESH | {"synchronize_session": False},
    )
    if written is None:
        raise InvalidTransition("the job has changed meanwhile")
    first = written.last_seq - len(events) + 1
    attempt = max(attempt, written.attempt)  # one that is given back still made its events
    rows = [
        {"id": new_id("uevt"), "job_id": written.id, "seq": seq, "attempt": attempt, **event._asdict()}
        for seq, event in enumerate(events, start=first)
    ]
    if rows:
        s.connection().execute(insert(JobEvent), rows)  # past the ORM, which takes as long again
    return written


def again(s: Session, job: Job, why: Event, **values: Any) -> Job:
    """Back into the queue, at its old place; or to rest, if that was asked for."""
    values = checkpoints.rewound(s, job) | {"status_reason": why.message} | values
    if job.status is Status.PAUSING:
        return move(s, job, Status.PAUSED, why, Event("job.paused", "paused"), **values)
    return move(s, job, Status.QUEUED, why, Event("job.queued", "waits for a worker again"), **values)


def cancel(s: Session, job: Job, message: str, **values: Any) -> Job:
    event = Event("job.cancelled", message)
    asked_at = func.coalesce(Job.cancel_requested_at, func.now())
    return move(s, job, Status.CANCELLED, event, cancel_requested_at=asked_at, status_reason=message, **values)


def fail(s: Session, job: Job, failure: Failure, **values: Any) -> Job:
    told = failure.model_dump(mode="json")
    event = Event("job.failed", failure.message, told, "error")
    return move(s, job, Status.FAILED, event, failure=told, status_reason=failure.message, **values)


def now(s: Session) -> str:
    time: datetime = s.scalars(select(func.now())).one()
    return time.isoformat().replace("+00:00", "Z")


def closed(history: list[dict[str, Any]], now: str) -> list[dict[str, Any]]:
    """The stages with the open one ended."""
    return [entry | {"finished_at": entry["finished_at"] or now} for entry in history]
