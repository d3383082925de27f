"""Whose rows a session sees: those of the tenant that it is bound to. Not bound, as the worker's and the sweep's: all.

The rule is in one place, so that no query can forget it: every statement on a table of `Owned` rows gets the tenant's
criterion, and every new row the tenant's name. What another tenant owns is not forbidden, it is not there. Past the
session, on a bare connection, nobody adds it: there a statement names its tenant, as `shown.OF_TENANT` does.
"""

from functools import lru_cache
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker, with_loader_criteria

from service.domain.identity import SYSTEM
from service.store.tables import Owned

EVERYBODYS: dict[str, Any] = {"every_tenant": True}  # execution options of a query that looks at all


class TenantSession(Session):
    pass


def bind(s: Session, tenant_id: str, actor: str = SYSTEM) -> None:
    s.info.update(tenant=tenant_id, actor=actor)


@lru_cache(maxsize=1024)
def bound(sessions: sessionmaker[Session], tenant_id: str, actor: str) -> sessionmaker[Session]:
    """Makes sessions as the given one does, but bound. Kept: each is a class of its own, which takes long to make."""
    return sessionmaker(**sessions.kw | {"class_": TenantSession, "info": {"tenant": tenant_id, "actor": actor}})


def tenant(s: Session) -> str:
    """Of a bound session."""
    tenant_id: str = s.info["tenant"]
    return tenant_id


def actor(s: Session) -> str:
    """On whose behalf it writes."""
    return str(s.info.get("actor", SYSTEM))


@event.listens_for(TenantSession, "do_orm_execute")
def _own_rows_alone(state: ORMExecuteState) -> None:
    tenant_id = state.session.info.get("tenant")
    if tenant_id is not None and "every_tenant" not in state.execution_options and not state.is_insert:
        own = with_loader_criteria(Owned, lambda table: table.tenant_id == tenant_id, include_aliases=True)
        state.statement = state.statement.options(own)


@event.listens_for(TenantSession, "before_flush")
def _owned_by(s: Session, *_: object) -> None:
    for row in s.new:
        if isinstance(row, Owned) and row.tenant_id is None:
            row.tenant_id = tenant(s)
