"""What /metrics tells of jobs, read from Postgres at scrape time; and the counters, bumped with what they count."""

from collections import Counter as Collected
from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.job import HELD, Status
from service.store.tables import Counter, Job
from service.store.workers import heard

JOBS_FINISHED = "unlearn_jobs_finished_total"  # {status, method, failure_code}
JOB_VERDICTS = "unlearn_job_verdicts_total"  # {result}
ATTEMPTS_LOST = "unlearn_attempts_lost_total"  # {code}
LEASES_EXPIRED = "unlearn_leases_expired_total"  # {queue}
FENCED_WRITES = "unlearn_fenced_writes_total"


class Figures(NamedTuple):
    """Gauges, by GPU class, which is the bell queue's name: what `queue` labels."""

    jobs: dict[tuple[Status, str], int]
    workers: dict[str, int]  # that were heard of lately and hear the class
    queue_oldest_age_s: dict[str, float]
    heartbeat_age_max_s: dict[str, float]


class Count(NamedTuple):
    name: str
    labels: dict[str, str]
    value: int


def bump(s: Session, name: str, labels: Mapping[str, str], by: int = 1) -> None:
    row = insert(Counter).values(name=name, labels=dict(labels), value=by)
    s.execute(
        row.on_conflict_do_update(
            index_elements=[Counter.name, Counter.labels], set_={"value": Counter.value + row.excluded.value}
        )
    )


def counters(s: Session) -> list[Count]:
    rows = s.execute(select(Counter.name, Counter.labels, Counter.value).order_by(Counter.name, Counter.labels))
    return [Count(*row) for row in rows]


def figures(s: Session) -> Figures:
    age_s = func.extract("epoch", func.now() - Job.updated_at)  # of a queued row: since it was queued, or queued again
    silence_s = func.extract("epoch", func.now() - Job.beat_at)
    jobs = s.execute(select(Job.status, Job.gpu_class, func.count()).group_by(Job.status, Job.gpu_class))
    waiting = select(Job.gpu_class, func.max(age_s)).where(Job.status == Status.QUEUED)
    running = select(Job.gpu_class, func.max(silence_s)).where(Job.status.in_(HELD))
    return Figures(
        {(status, gpu_class): count for status, gpu_class, count in jobs},
        dict(Collected(gpu_class for worker in heard(s) for gpu_class in {*worker.gpu_classes, "any"})),
        {gpu_class: float(age) for gpu_class, age in s.execute(waiting.group_by(Job.gpu_class))},
        {gpu_class: float(age) for gpu_class, age in s.execute(running.group_by(Job.gpu_class))},
    )
