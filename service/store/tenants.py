"""Tenants, which an administrator of the deployment adds. The caller commits."""

from collections.abc import Sequence

from sqlalchemy import Connection, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.store import audit
from service.store.tables import Tenant

DEFAULT = "default"  # there from the beginning, for a deployment that serves one party


def add(
    s: Session,
    tenant_id: str,
    *,
    approvals: int = 0,
    keep_files_days: int | None = None,
    keep_forgotten_days: int = 0,
    max_running_jobs: int | None = None,
    max_open_jobs: int | None = None,
) -> Tenant:
    """Raises InvalidTransition if the name is taken."""
    rules = {"approvals": approvals, "keep_files_days": keep_files_days, "keep_forgotten_days": keep_forgotten_days}
    rules |= {"max_running_jobs": max_running_jobs, "max_open_jobs": max_open_jobs}
    row = insert(Tenant).values(id=tenant_id, **rules)
    if s.scalar(row.on_conflict_do_nothing().returning(Tenant.id)) is None:
        raise InvalidTransition(f"there is a tenant {tenant_id!r} already")
    audit.write(s, "tenant.added", "tenant", tenant_id, rules, tenant_id=tenant_id)
    return get(s, tenant_id)


def get(s: Session, tenant_id: str) -> Tenant:
    tenant = s.get(Tenant, tenant_id)
    if tenant is None:
        raise NotFound("tenant", tenant_id)
    return tenant


def exists(connection: Connection, tenant_id: str) -> bool:
    return connection.execute(select(Tenant.id).where(Tenant.id == tenant_id)).one_or_none() is not None


def change(s: Session, tenant_id: str, **rules: int | None) -> Tenant:
    """Those that are given, for what comes after it: a request keeps the number of approvals with which it began.

    Args:
        rules: columns of the table, such as `approvals` and `keep_files_days`.
    """
    tenant = get(s, tenant_id)
    for name, value in rules.items():
        setattr(tenant, name, value)
    audit.write(s, "tenant.changed", "tenant", tenant_id, rules, tenant_id=tenant_id)
    return tenant


def every(s: Session) -> Sequence[Tenant]:
    return s.scalars(select(Tenant).order_by(Tenant.id)).all()
