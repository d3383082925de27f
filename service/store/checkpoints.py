"""What a job's attempts can go on from. Whoever calls holds the job's row locked, and commits."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.job import Status
from service.store.rows import CheckpointRow
from service.store.tables import Job, JobCheck, JobCheckpoint, JobStep

KEPT = 2  # should the last be torn
KEPT_OF_FAILED = timedelta(days=7)  # after its end: until then it can be tried again from there


def promote(s: Session, job: Job, written: Sequence[CheckpointRow]) -> None:
    """By this they are the job's; of all, the last KEPT stay."""
    rows = [{"job_id": job.id, "fence": job.fence, **row._asdict()} for row in written]
    s.execute(insert(JobCheckpoint).on_conflict_do_nothing(), rows)
    kept = [row.key for row in of_job(s, job.id)[:KEPT]]
    s.execute(delete(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.key.not_in(kept)))


def of_job(s: Session, job_id: str) -> Sequence[JobCheckpoint]:
    """The newest first."""
    rows = select(JobCheckpoint).where(JobCheckpoint.job_id == job_id)
    return s.scalars(rows.order_by(JobCheckpoint.fence.desc(), JobCheckpoint.step.desc())).all()


def rewound(s: Session, job: Job) -> dict[str, Any]:
    """How far a job is between two attempts, as values of its row: the next one goes on from the last checkpoint."""
    saved = of_job(s, job.id)
    step = saved[0].step if saved else 0
    tokens = select(func.max(JobStep.tokens)).where(JobStep.job_id == job.id, JobStep.step == step)
    return {"step": step, "trained_tokens": s.scalar(tokens) or 0, "started_at": None, "rung_at": None}


def take_over(s: Session, job: Job, step: int) -> None:
    """The steps and checks until there become the current attempt's: they lead to its result. Later ones stay the lost one's.

    Once: a repetition finds that it has them.
    """
    for table in (JobStep, JobCheck):
        latest = select(func.max(table.fence)).where(table.job_id == job.id)
        if s.scalar(latest) == job.fence:
            continue
        s.execute(
            update(table)
            .where(table.job_id == job.id, table.fence == latest.scalar_subquery(), table.step <= step)
            .values(fence=job.fence)
            .execution_options(synchronize_session=False)
        )


def drop(s: Session, job_id: str) -> None:
    s.execute(delete(JobCheckpoint).where(JobCheckpoint.job_id == job_id))


def drop_old(s: Session) -> None:
    """Those of jobs that failed long ago, and were not tried again."""
    old = select(Job.id).where(Job.status == Status.FAILED, Job.finished_at < func.now() - KEPT_OF_FAILED)
    s.execute(delete(JobCheckpoint).where(JobCheckpoint.job_id.in_(old)).execution_options(synchronize_session=False))


def named(s: Session, job_ids: Collection[str]) -> set[str]:
    """The keys of these jobs' checkpoints."""
    return set(s.scalars(select(JobCheckpoint.key).where(JobCheckpoint.job_id.in_(job_ids))))
