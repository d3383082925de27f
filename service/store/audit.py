"""Who did what: an append-only chain per tenant, in which each row's hash covers the row before.

What is written is noted first, and inserted by the commit that makes it true, after all else: a chain is a queue that
everybody of its tenant stands in, and nobody holds it for longer than his own insert. So no two transactions wait for
each other, either: this lock is always the last.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import bindparam, event, func, insert, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from service.evidence import canonical, chain
from service.evidence.chain import AuditEntry, Checked, Head
from service.store import tenancy
from service.store.ids import new_id
from service.store.session import Sessions, to_json
from service.store.tables import AuditCheck, AuditEvent, Tenant

NOTED = "audit"  # in Session.info
PAGE = 1000  # entries
WHOLE_EVERY = timedelta(days=1)

# Made once: all that is written writes here, too. Waits for the turn at a chain, and says when it came.
TURN = select(func.clock_timestamp()).select_from(
    func.pg_advisory_xact_lock(func.hashtextextended(bindparam("chain"), 0))
)
LAST = (
    select(AuditEvent.seq, AuditEvent.hash)
    .where(AuditEvent.tenant_id == bindparam("tenant"))
    .order_by(AuditEvent.seq.desc())
    .limit(1)
)


class Noted(NamedTuple):
    tenant_id: str
    told: dict[str, Any]  # actor, action, object_type, object_id, data


def write(
    s: Session,
    action: str,
    object_type: str,
    object_id: str,
    data: Mapping[str, Any] | None = None,
    *,
    tenant_id: str | None = None,
) -> None:
    """One row, with the caller's commit. Never a row's text, a subject or a secret in `data`; no fractions either.

    Args:
        tenant_id: None: that of the session.
    """
    told = {"actor": tenancy.actor(s), "action": action, "object_type": object_type, "object_id": object_id}
    s.info.setdefault(NOTED, []).append(Noted(tenant_id or tenancy.tenant(s), told | {"data": data or {}}))


def head(s: Session, tenant_id: str) -> Head | None:
    """The last row; None: the chain has none."""
    row = s.connection().execute(LAST, {"tenant": tenant_id}).one_or_none()
    return Head(seq=row.seq, hash=row.hash) if row else None


def events(s: Session, *, after_seq: int = 0, limit: int = 100, object_id: str | None = None) -> Sequence[AuditEvent]:
    """Of the session's tenant, in order."""
    rows = select(AuditEvent).where(AuditEvent.tenant_id == tenancy.tenant(s), AuditEvent.seq > after_seq)
    if object_id is not None:
        rows = rows.where(AuditEvent.object_id == object_id)
    return s.scalars(rows.order_by(AuditEvent.seq).limit(limit)).all()


def fields(row: AuditEvent) -> dict[str, Any]:
    """An entry as the export has it; one that somebody altered, too."""
    names = ("seq", "id", "actor", "action", "object_type", "object_id", "data", "prev_hash", "hash")
    told = {name: getattr(row, name) for name in names}
    return told | {"tenant": row.tenant_id, "created_at": canonical.instant(row.created_at)}


def export(sessions: Sessions, tenant_id: str, after_seq: int = 0) -> Iterator[bytes]:
    """The lines of the export, in order. No connection is held while their reader takes his time: entries do not change."""
    while True:
        rows = select(AuditEvent).where(AuditEvent.tenant_id == tenant_id, AuditEvent.seq > after_seq)
        with sessions.begin() as s:
            page = s.scalars(rows.order_by(AuditEvent.seq).limit(PAGE)).all()
        yield from (chain.line(fields(row)) for row in page)
        if len(page) < PAGE:
            return
        after_seq = page[-1].seq


# --- whether it still holds


def due(s: Session, every: timedelta) -> Sequence[str]:
    """Tenants whose log was not checked for so long."""
    last = select(Tenant.id).outerjoin(AuditCheck, AuditCheck.tenant_id == Tenant.id)
    stale = AuditCheck.checked_at.is_(None) | (AuditCheck.checked_at < func.now() - every)
    return s.scalars(last.where(stale).order_by(AuditCheck.checked_at.nulls_first())).all()


def check(sessions: Sessions, tenant_id: str) -> Checked:
    """Verifies a tenant's log and notes what it found.

    What came since the last check is cheap, and is looked at each time. Entries that were checked could be altered later:
    once a day, and as long as there is a fault, it begins with the first one, and has to come by where it was before.
    """
    with sessions.begin() as s:
        before = last_check(s, tenant_id)
        known = Head(seq=before.seq, hash=before.hash) if before and before.seq else None
        since = known if _goes_on(s, tenant_id) else None
    found = chain.verify(export(sessions, tenant_id, since.seq if since else 0), anchor=known, after=since)
    with sessions.begin() as s:
        _note(s, tenant_id, found, whole=since is None)
    return found


def last_check(s: Session, tenant_id: str) -> AuditCheck | None:
    return s.get(AuditCheck, tenant_id)


def _goes_on(s: Session, tenant_id: str) -> bool:
    """Whether the next check may begin where the last one ended: nothing was wrong, and that entry is still there."""
    same = (AuditEvent.seq == AuditCheck.seq) & (AuditEvent.hash == AuditCheck.hash)
    held = select(AuditCheck.seq).join(AuditEvent, (AuditEvent.tenant_id == AuditCheck.tenant_id) & same)
    held = held.where(AuditCheck.tenant_id == tenant_id, AuditCheck.fault.is_(None))
    return s.scalar(held.where(AuditCheck.whole_at > func.now() - WHOLE_EVERY)) is not None


def _note(s: Session, tenant_id: str, found: Checked, *, whole: bool) -> None:
    """After a fault, the last entry that held stays the one before it was found."""
    news: dict[str, Any] = {"checked_at": func.now(), "fault": found.fault and found.fault._asdict()}
    if found.head:
        news |= found.head.model_dump()
    if whole:
        news["whole_at"] = func.now()
    first = {"tenant_id": tenant_id, "seq": 0, "hash": chain.genesis(tenant_id), "whole_at": func.now()} | news
    row = postgresql.insert(AuditCheck).values(first)
    s.execute(row.on_conflict_do_update(index_elements=[AuditCheck.tenant_id], set_=news))


# --- with the caller's commit


@event.listens_for(tenancy.TenantSession, "before_commit")
def _append(s: Session) -> None:
    noted: list[Noted] = s.info.pop(NOTED, [])
    if noted:
        s.flush()  # else it would come after the lock
    for tenant_id, of_tenant in groupby(sorted(noted, key=lambda one: one.tenant_id), key=lambda one: one.tenant_id):
        now = s.connection().scalars(TURN, {"chain": f"audit {tenant_id}"}).one()
        last = head(s, tenant_id)
        first, prev_hash = (last.seq + 1, last.hash) if last else (1, chain.genesis(tenant_id))
        rows = []
        for seq, one in enumerate(of_tenant, start=first):
            place = {"tenant": tenant_id, "seq": seq, "id": new_id("aud"), "created_at": canonical.instant(now)}
            # As the database gives it back: what it cannot store must not be in the hash either
            entry = AuditEntry(**json.loads(to_json(place | one.told)))
            row = chain.chained(prev_hash, entry)
            rows.append(row.model_dump(exclude={"tenant", "created_at"}) | {"tenant_id": tenant_id, "created_at": now})
            prev_hash = row.hash
        s.connection().execute(insert(AuditEvent), rows)


@event.listens_for(tenancy.TenantSession, "after_rollback")
def _forget(s: Session) -> None:
    s.info.pop(NOTED, None)
