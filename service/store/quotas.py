"""How many jobs a tenant may run at once, and how many it may have that have not ended. The caller commits.

A tenant without a bound pays a read of its row. That of one with a bound is locked until the commit of what counts
against it, so that two at once cannot both take the last place.
"""

from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, and_, bindparam, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from service.domain.errors import QuotaExceeded
from service.domain.job import HELD, TERMINAL
from service.store.tables import Job, Tenant
from service.store.tenancy import EVERYBODYS

OPEN_JOBS = "open-jobs"  # the policy's name in the problem
RETRY_AFTER_S = 60  # nobody knows when a job ends


_held = aliased(Job)
_running = select(func.count()).where(_held.tenant_id == Tenant.id, _held.status.in_(HELD)).scalar_subquery()
# Of a row of tenants. Where it has no bound, nothing is counted.
RUNS_MOST = and_(Tenant.max_running_jobs.is_not(None), Tenant.max_running_jobs <= _running)
AT_MOST = select(Tenant.id, Tenant.max_running_jobs).where(Tenant.id.in_(bindparam("ids", expanding=True)), RUNS_MOST)


def at_most(s: Session | Connection, tenant_ids: Collection[str]) -> dict[str, int]:
    """The bounds of those of the tenants that run as many jobs as they may."""
    if not tenant_ids:
        return {}
    found = s.execute(AT_MOST, {"ids": list(tenant_ids)}, execution_options=EVERYBODYS)
    return {row.id: row.max_running_jobs for row in found}


def may_run(s: Session, tenant_id: str) -> bool:
    """Whether a tenant with a bound may run one job more.

    If so, nobody else is told the same before the commit; else nothing stays locked.
    """
    locking = s.begin_nested()
    bound = _bound(s, Tenant.max_running_jobs, tenant_id, lock=True)
    may = bound is None or _count(s, tenant_id, Job.status.in_(HELD)) < bound
    if may:
        locking.commit()
    else:  # two workers could each hold the tenant that the other waits for
        locking.rollback()
    return may


def take_place(s: Session, tenant_id: str) -> None:
    """For one more job that has not ended. Raises QuotaExceeded."""
    bound = _bound(s, Tenant.max_open_jobs, tenant_id)
    if bound is not None:
        bound = _bound(s, Tenant.max_open_jobs, tenant_id, lock=True)
    if bound is not None and _count(s, tenant_id, Job.status.not_in(TERMINAL)) >= bound:
        detail = f"{bound} jobs that have not ended are allowed; cancel one, or wait until one ends"
        raise QuotaExceeded(OPEN_JOBS, detail, RETRY_AFTER_S)


def full(s: Session, tenant_id: str) -> int | None:
    """The bound for which `take_place` would find no place now; None: it would find one."""
    bound = _bound(s, Tenant.max_open_jobs, tenant_id)
    return None if bound is None or _count(s, tenant_id, Job.status.not_in(TERMINAL)) < bound else bound


def _bound(s: Session, column: InstrumentedAttribute[int | None], tenant_id: str, lock: bool = False) -> int | None:
    row = select(column).where(Tenant.id == tenant_id)
    if lock:  # not FOR UPDATE: whatever names the tenant, as every new row of it does, would have to wait
        row = row.with_for_update(key_share=True)
    return s.scalar(row)


def _count(s: Session, tenant_id: str, status: ColumnElement[bool]) -> int:
    """A statement of its own, after the lock: it sees what was committed by those who had it before."""
    return s.scalars(select(func.count()).select_from(Job).where(and_(Job.tenant_id == tenant_id, status))).one()
