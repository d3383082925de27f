"""What a job's attempts can go on from. Whoever calls holds the job's row locked, and commits."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from itertools import takewhile
from typing import Any

from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

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
    """How far a job is between two attempts, as values of its row: the next one goes on from the last checkpoint that can
    be read, as a rule the newest."""
    saved = of_job(s, job.id)
    step = saved[0].step if saved else 0
    tokens = select(func.max(JobStep.tokens)).where(JobStep.job_id == job.id, JobStep.step == step)
    return {"step": step, "trained_tokens": s.scalar(tokens) or 0, "started_at": None, "rung_at": None}


def take_over(s: Session, job: Job, step: int) -> None:
    """An attempt goes on from the checkpoint of a step; 0: from none, since none could be read.

    The steps and checks until there become its own: they lead to its result; later ones stay the lost attempts'. Newer
    checkpoints are none.
    """
    tables: tuple[type[JobStep | JobCheck], ...] = (JobStep, JobCheck)
    for table in tables:
        its = aliased(table)
        has = exists().where(its.job_id == job.id, its.fence == job.fence, its.step == table.step)
        fences = select(table.fence).where(table.job_id == job.id, table.fence < job.fence).distinct()
        for fence in s.scalars(fences.order_by(table.fence.desc())).all():
            earlier = (table.job_id == job.id) & (table.fence == fence) & (table.step <= step) & ~has
            moved = update(table).where(earlier).values(fence=job.fence)
            s.execute(moved.execution_options(synchronize_session=False))
    for row in takewhile(lambda row: row.step != step, of_job(s, job.id)):
        s.delete(row)


def drop(s: Session, job_id: str) -> None:
    s.execute(delete(JobCheckpoint).where(JobCheckpoint.job_id == job_id))


def drop_old(s: Session) -> None:
    """Those of jobs that failed long ago, and were not tried again."""
    old = select(Job.id).where(Job.status == Status.FAILED, Job.finished_at < func.now() - KEPT_OF_FAILED)
    s.execute(delete(JobCheckpoint).where(JobCheckpoint.job_id.in_(old)).execution_options(synchronize_session=False))


def named(s: Session, job_ids: Collection[str]) -> set[str]:
    """The keys of these jobs' checkpoints."""
    return set(s.scalars(select(JobCheckpoint.key).where(JobCheckpoint.job_id.in_(job_ids))))
