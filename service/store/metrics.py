"""What /metrics tells of jobs, read from Postgres at scrape time; and the counters, bumped with what they count."""

from collections import Counter as Collected
from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.deletion import CLOSED
from service.domain.job import HELD, Status
from service.store.tables import (
    AuditCheck,
    AuditEvent,
    Counter,
    DeletionRequest,
    Job,
    Tenant,
    WebhookDelivery,
    WebhookEndpoint,
)
from service.store.workers import busy, can_run, heard

JOBS_FINISHED = "unlearn_jobs_finished_total"  # {status, method, failure_code}
JOB_VERDICTS = "unlearn_job_verdicts_total"  # {result}
ATTEMPTS_LOST = "unlearn_attempts_lost_total"  # {code}
LEASES_EXPIRED = "unlearn_leases_expired_total"  # {queue}
FENCED_WRITES = "unlearn_fenced_writes_total"
WEBHOOK_DELIVERIES = "unlearn_webhook_deliveries_total"  # {result}, of each attempt


class Figures(NamedTuple):
    """Gauges, by GPU class, which is the bell queue's name: what `queue` labels."""

    jobs: dict[tuple[Status, str], int]
    workers: dict[str, int]  # that were heard of lately and hear the class
    queue_oldest_age_s: dict[str, float]
    queue_stalled_age_s: dict[str, float]  # of the jobs that wait for no reason that is known
    heartbeat_age_max_s: dict[str, float]
    requests: "Requests"
    outbox: "Outbox"


class Requests(NamedTuple):
    """Deletion requests, of all tenants."""

    by_kind: dict[tuple[str, str], int]  # status and regulation
    overdue: int
    next_due_s: float | None  # since the epoch; null: none is open and still in time


class Outbox(NamedTuple):
    """Deliveries of webhooks, of all tenants."""

    pending: int
    oldest_age_s: float  # how long one that is due has waited without its endpoint having a turn


class AuditFigures(NamedTuple):
    """Of all tenants' logs."""

    events: int
    valid: bool  # at each one's last check
    check_age_s: float  # since the one that was not checked for longest


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
        _stalled(s),
        {gpu_class: float(age) for gpu_class, age in s.execute(running.group_by(Job.gpu_class))},
        _requests(s),
        _outbox(s),
    )


def _stalled(s: Session) -> dict[str, float]:
    """How long the oldest job has waited that a worker with a free slot should have taken, or that no worker can run.

    Not one that waits after a failure, nor one whose tenant runs as many as it may, nor one of which all workers that can run it
    have no slot free, be it for another class.
    """
    full = select(Job.tenant_id).join(Tenant, Tenant.id == Job.tenant_id).where(Job.status.in_(HELD))
    full = full.group_by(Job.tenant_id, Tenant.max_running_jobs).having(func.count() >= Tenant.max_running_jobs)
    age_s = func.extract("epoch", func.now() - func.greatest(Job.updated_at, Job.not_before))  # passes over a null
    kinds = (Job.gpu_class, Job.min_vram_gib)
    waiting = select(*kinds, func.max(age_s)).where(Job.status == Status.QUEUED, Job.tenant_id.not_in(full))
    there, held = heard(s), busy(s)
    ages = dict[str, float]()
    for gpu_class, vram_gib, age in s.execute(waiting.group_by(*kinds)):
        able = [worker for worker in there if can_run(worker, gpu_class, vram_gib)]
        all_busy = able and all(held.get(worker.name, 0) >= worker.slots for worker in able)
        if age > 0 and not all_busy:
            ages[gpu_class] = max(float(age), ages.get(gpu_class, 0.0))
    return ages


def _requests(s: Session) -> Requests:
    kinds = (DeletionRequest.status, DeletionRequest.regulation)
    count = s.execute(select(*kinds, func.count()).group_by(*kinds))
    late = func.count().filter(DeletionRequest.due_at < func.now())
    to_come = DeletionRequest.due_at >= func.now()  # one that is overdue must not hide those that will be
    first = func.extract("epoch", func.min(DeletionRequest.due_at).filter(to_come))
    overdue, next_due_s = s.execute(select(late, first).where(DeletionRequest.status.not_in(CLOSED))).one()
    return Requests(
        {(status, regulation): number for status, regulation, number in count},
        overdue,
        None if next_due_s is None else float(next_due_s),
    )


def _outbox(s: Session) -> Outbox:
    """An endpoint that is down has turns too, so what waits behind it does not look forgotten."""
    since = func.greatest(WebhookDelivery.next_at, WebhookEndpoint.leased_until)  # passes over a null
    oldest_s = func.extract("epoch", func.now() - func.min(since))
    pending = select(func.count(), oldest_s).select_from(WebhookDelivery).join(WebhookEndpoint)
    of_enabled = pending.where(WebhookDelivery.status == "pending", WebhookEndpoint.status == "enabled")
    count, age_s = s.execute(of_enabled).one()
    return Outbox(count, max(float(age_s or 0), 0.0))


def audit_figures(s: Session) -> AuditFigures:
    """The logs have no gaps, so that nothing must be counted: each one's last number is found by its primary key."""
    last = select(func.max(AuditEvent.seq)).where(AuditEvent.tenant_id == Tenant.id).scalar_subquery()
    age_s = func.extract("epoch", func.now() - func.coalesce(AuditCheck.checked_at, Tenant.created_at))
    of_all = select(func.coalesce(func.sum(last), 0), func.bool_and(AuditCheck.fault.is_(None)), func.max(age_s))
    events, valid, oldest_s = s.execute(
        of_all.select_from(Tenant).outerjoin(AuditCheck, AuditCheck.tenant_id == Tenant.id)
    ).one()
    return AuditFigures(int(events), bool(valid), float(oldest_s))
