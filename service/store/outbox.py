"""What tenants' servers are to be told: written in the transaction of what it tells of, sent afterwards.

A message is one event to the byte, a delivery is a message to one endpoint, an attempt is one call. Whoever sends leases
an endpoint, not a delivery: so each has one call at a time, of whichever of its deliveries is due first, and no endpoint
can keep others from their turn. A sender that vanishes loses its lease, and the same message is sent again.
"""

from collections.abc import Collection
from datetime import datetime, timedelta
from random import random
from typing import NamedTuple

from sqlalchemy import bindparam, delete, func, insert, or_, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.store import webhooks
from service.store.ids import new_id
from service.store.metrics import WEBHOOK_DELIVERIES, bump
from service.store.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint, WebhookMessage
from service.webhooks import events, schedule
from service.webhooks.events import EventType, Subject

FAILING_MAX = timedelta(days=5)  # an endpoint that took nothing for so long is disabled
LEASE_MARGIN = timedelta(seconds=45)  # beyond an attempt's own limit: for the two transactions around it
KEPT = timedelta(days=30)  # a message and the log of its deliveries
WANT = (  # made once: each move of a job asks it
    select(WebhookEndpoint.id)
    .where(
        WebhookEndpoint.tenant_id == bindparam("tenant"),
        WebhookEndpoint.status == "enabled",
        or_(
            func.jsonb_array_length(WebhookEndpoint.event_types) == 0,
            WebhookEndpoint.event_types.contains(bindparam("wanted", type_=JSONB)),
        ),
    )
    .order_by(WebhookEndpoint.id)
    .with_for_update(read=True, key_share=True)  # it is not deleted before the deliveries name it
)
DUE = (WebhookDelivery.status == "pending") & (WebhookDelivery.next_at <= func.now())


class Turn(NamedTuple):
    """What to send now, and the lease under which it is sent."""

    endpoint_id: str
    delivery_id: str
    message_id: str
    body: str
    url: str
    sealed_secrets: list[str]
    leased_until: datetime


# --- what is written with an event


def enqueue(s: Session, tenant_id: str, event: EventType, subject: Subject) -> None:
    """For each of the tenant's enabled endpoints that wants to know; for none, nothing is written."""
    found = s.scalars(WANT, {"tenant": tenant_id, "wanted": [event]}).all()
    if found:
        _write(s, tenant_id, event, subject, found)


def enqueue_test(s: Session, endpoint_id: str) -> WebhookDelivery:
    """To this endpoint alone, whatever it wants to know. Raises NotFound; InvalidTransition where it is disabled."""
    row = _open(s, endpoint_id)
    subject = Subject(row.id, "webhook_endpoint", row.status)
    [delivery_id] = _write(s, row.tenant_id, EventType.TEST, subject, [row.id])
    return delivery(s, delivery_id)


def replay(s: Session, delivery_id: str) -> WebhookDelivery:
    """A new delivery of the same message, which its receiver knows by its id.

    Raises NotFound; InvalidTransition for one that is pending, or where the endpoint is disabled.
    """
    row = delivery(s, delivery_id)
    if row.status == "pending":
        raise InvalidTransition("the delivery is pending: it will be tried anyway")
    _open(s, row.endpoint_id)
    again = WebhookDelivery(
        id=new_id("whdel"), tenant_id=row.tenant_id, message_id=row.message_id, endpoint_id=row.endpoint_id
    )
    s.add(again)
    s.flush()
    s.refresh(again)
    return again


def delivery(s: Session, delivery_id: str) -> WebhookDelivery:
    row = s.get(WebhookDelivery, delivery_id)
    if row is None:
        raise NotFound("webhook delivery", delivery_id)
    return row


def _open(s: Session, endpoint_id: str) -> WebhookEndpoint:
    row = webhooks.locked(s, endpoint_id)
    if row.status != "enabled":
        raise InvalidTransition(f"the endpoint is disabled: {row.status_reason}")
    return row


def _write(
    s: Session, tenant_id: str, event: EventType, subject: Subject, endpoint_ids: Collection[str]
) -> Collection[str]:
    """The new deliveries' ids. The time is the clock's, not the transaction's, which may have begun before what an
    earlier one told of the same object: so what is due first is what happened first."""
    at = s.scalars(select(func.clock_timestamp())).one()
    message = {"id": new_id("whmsg"), "type": event, "body": events.body(event, at, subject).decode()}
    s.execute(insert(WebhookMessage), [message | {"tenant_id": tenant_id, "created_at": at}])
    common = {"tenant_id": tenant_id, "message_id": message["id"], "next_at": at, "created_at": at}
    rows = [common | {"id": new_id("whdel"), "endpoint_id": endpoint_id} for endpoint_id in endpoint_ids]
    s.execute(insert(WebhookDelivery), rows)
    return [str(row["id"]) for row in rows]


# --- what the sender does


def take(s: Session, timeout_s: float) -> Turn | None:
    """Leases the endpoint whose turn is longest ago among those with something due; None: there is none."""
    _drop_what_nobody_takes(s)
    idle = or_(WebhookEndpoint.leased_until.is_(None), WebhookEndpoint.leased_until <= func.now())
    waiting = select(WebhookDelivery.id).where(WebhookDelivery.endpoint_id == WebhookEndpoint.id, DUE).exists()
    found = s.execute(
        select(WebhookEndpoint, func.now())
        .where(WebhookEndpoint.status == "enabled", idle, waiting)
        .order_by(WebhookEndpoint.leased_until.nulls_first(), WebhookEndpoint.id)
        .limit(1)
        .with_for_update(of=WebhookEndpoint, key_share=True, skip_locked=True),
        execution_options=webhooks.FRESH,
    ).one_or_none()
    if found is None:
        return None
    endpoint, now = found
    due = select(WebhookDelivery.id, WebhookMessage.id, WebhookMessage.body)
    due = due.join(WebhookMessage, WebhookMessage.id == WebhookDelivery.message_id)
    due = due.where(WebhookDelivery.endpoint_id == endpoint.id, DUE)
    first = s.execute(due.order_by(WebhookDelivery.next_at, WebhookDelivery.id).limit(1)).one_or_none()
    if first is None:  # another sender took it between the two statements
        return None
    endpoint.leased_until = now + timedelta(seconds=timeout_s) + LEASE_MARGIN
    if endpoint.old_secret_until is not None and endpoint.old_secret_until <= now:
        endpoint.sealed_old_secret = endpoint.old_secret_until = None
    sealed = [one for one in (endpoint.sealed_secret, endpoint.sealed_old_secret) if one is not None]
    return Turn(endpoint.id, *first, endpoint.url, sealed, endpoint.leased_until)


def record(
    s: Session,
    turn: Turn,
    *,
    status: int | None,
    latency_ms: int,
    reply: str,
    error: str | None,
    retry_after_s: float | None,
    disables: bool,
) -> bool:
    """What came of it, as sender.Delivery has it. False: the lease went to somebody else, or the endpoint is gone."""
    ours = (WebhookEndpoint.id == turn.endpoint_id) & (WebhookEndpoint.leased_until == turn.leased_until)
    wanted = select(WebhookEndpoint, func.now()).where(ours).with_for_update(of=WebhookEndpoint, key_share=True)
    found = s.execute(wanted, execution_options=webhooks.FRESH).one_or_none()
    row = s.get(WebhookDelivery, turn.delivery_id, with_for_update=True, populate_existing=True) if found else None
    if found is None or row is None or row.status != "pending":
        return False
    endpoint, now = found
    row.attempts += 1
    told = {"status": status, "latency_ms": latency_ms, "reply": reply, "error": error}
    s.execute(insert(WebhookAttempt), [{"delivery_id": row.id, "number": row.attempts, "at": now, **told}])
    endpoint.leased_until = now
    endpoint.failing_since = None if error is None else endpoint.failing_since or now
    why = _why_disabled(endpoint, now, disables)
    wait_s = None if error is None or why else schedule.next_attempt(row.attempts, random(), retry_after_s)  # noqa: S311
    if wait_s is None:
        row.status = "delivered" if error is None else "failed"
        row.next_at, row.finished_at = None, now
    else:
        row.next_at = now + timedelta(seconds=wait_s)
    if why:
        webhooks.disable(s, endpoint, why)
    s.flush()
    bump(s, WEBHOOK_DELIVERIES, {"result": "retried" if wait_s is not None else row.status})
    return True


def _why_disabled(endpoint: WebhookEndpoint, now: datetime, gone: bool) -> str | None:
    if gone:
        return "it answered 410 Gone"
    if endpoint.failing_since is not None and now - endpoint.failing_since >= FAILING_MAX:
        return f"it has taken nothing for {FAILING_MAX.days} days"
    return None


def _drop_what_nobody_takes(s: Session) -> None:
    """Of endpoints that are disabled; also what came in the moment in which they were."""
    disabled = select(WebhookEndpoint.id).where(WebhookEndpoint.status == "disabled")
    left = select(WebhookDelivery.id).where(
        WebhookDelivery.status == "pending", WebhookDelivery.endpoint_id.in_(disabled)
    )
    s.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.id.in_(left.with_for_update(skip_locked=True)))
        .values(status="cancelled", next_at=None, finished_at=func.now())
        .execution_options(synchronize_session=False)
    )


def forget(s: Session) -> None:
    """Old messages, with the log of their deliveries: what a receiver answered is nobody's business for ever."""
    waits = select(WebhookDelivery.id).where(
        WebhookDelivery.message_id == WebhookMessage.id, WebhookDelivery.status == "pending"
    )
    old = delete(WebhookMessage).where(WebhookMessage.created_at < func.now() - KEPT, ~waits.exists())
    s.execute(old.execution_options(synchronize_session=False))
