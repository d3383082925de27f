"""Where a tenant wants to be told, and the log of what was tried there. The caller commits.

A secret is made here, returned once, and kept sealed: to sign, it must be known again.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import delete as deleted
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.domain.errors import FieldProblem, InvalidRequest, NotFound
from service.store import audit, idempotency, tenancy
from service.store.ids import new_id
from service.store.paging import Order, fetch_page
from service.store.secrets import Secrets
from service.store.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint, WebhookMessage
from service.webhooks.events import EventType
from service.webhooks.signing import new_secret

FRESH: dict[str, Any] = {"populate_existing": True}  # what a lock waited for may have changed the row
OLD_SECRET_SIGNS = timedelta(hours=24)
ENDPOINTS_MAX = 32  # of a tenant: each of its events is a row for each


class NewSecret(NamedTuple):
    row: WebhookEndpoint
    secret: str


class Logged(NamedTuple):
    delivery: WebhookDelivery
    type: str  # of its message
    attempts: Sequence[WebhookAttempt]


def create(
    s: Session, secrets: Secrets, *, url: str, description: str = "", event_types: Collection[EventType] = ()
) -> NewSecret:
    """Of the session's tenant. Raises InvalidRequest where it has too many.

    Args:
        url: one that guard.pin accepted.
        event_types: none: all.
    """
    if s.scalars(select(func.count()).select_from(WebhookEndpoint)).one() >= ENDPOINTS_MAX:
        raise InvalidRequest(FieldProblem("", f"a tenant has at most {ENDPOINTS_MAX} endpoints", "too_many"))
    endpoint_id, secret = new_id("whep"), new_secret()
    row = WebhookEndpoint(
        id=endpoint_id,
        url=url,
        description=description,
        event_types=sorted(set(event_types)),
        sealed_secret=_sealed(secrets, endpoint_id, secret),
        created_by=tenancy.actor(s),
    )
    s.add(row)
    s.flush()
    s.refresh(row)
    audit.write(s, "webhook_endpoint.created", "webhook_endpoint", row.id, {"event_types": row.event_types})
    return NewSecret(row, secret)


def get(s: Session, endpoint_id: str) -> WebhookEndpoint:
    row = s.get(WebhookEndpoint, endpoint_id)
    if row is None:
        raise NotFound("webhook endpoint", endpoint_id)
    return row


def locked(s: Session, endpoint_id: str) -> WebhookEndpoint:
    """Against changes; deliveries may name it meanwhile."""
    wanted = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id).with_for_update(key_share=True)
    row = s.scalar(wanted, execution_options=FRESH)
    if row is None:
        raise NotFound("webhook endpoint", endpoint_id)
    return row


def page(
    s: Session, *, after: str | None = None, before: str | None = None, limit: int = 20, order: Order = "desc"
) -> tuple[Sequence[WebhookEndpoint], bool]:
    rows = select(WebhookEndpoint)
    return fetch_page(s, rows, WebhookEndpoint.id, after=after, before=before, limit=limit, order=order)


def delete(s: Session, endpoint_id: str) -> None:
    """With the log of its deliveries, and what is pending."""
    gone = deleted(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id).returning(WebhookEndpoint.id)
    if s.scalar(gone.execution_options(synchronize_session=False)) is None:
        raise NotFound("webhook endpoint", endpoint_id)
    _withdraw_answers(s, endpoint_id)
    audit.write(s, "webhook_endpoint.deleted", "webhook_endpoint", endpoint_id)


def rotate(s: Session, secrets: Secrets, endpoint_id: str) -> NewSecret:
    """A new secret. The one before signs beside it for a day; one before that does no more."""
    row, secret = locked(s, endpoint_id), new_secret()
    if row.sealed_old_secret is not None:  # it signs no more; after a day, no answer is left that has one of before
        _withdraw_answers(s, endpoint_id)
    row.sealed_old_secret, row.sealed_secret = row.sealed_secret, _sealed(secrets, row.id, secret)
    row.old_secret_until = row.updated_at = s.scalars(select(func.now())).one()
    row.old_secret_until += OLD_SECRET_SIGNS
    audit.write(s, "webhook_endpoint.secret_rotated", "webhook_endpoint", row.id)
    return NewSecret(row, secret)


def enable(s: Session, endpoint_id: str) -> WebhookEndpoint:
    """Again, for what happens from now on. One that is enabled stays so."""
    row = locked(s, endpoint_id)
    if row.status == "disabled":
        row.status, row.status_reason, row.failing_since = "enabled", None, None
        row.updated_at = s.scalars(select(func.now())).one()
        audit.write(s, "webhook_endpoint.enabled", "webhook_endpoint", row.id)
    return row


def disable(s: Session, row: WebhookEndpoint, reason: str) -> None:
    """`row` must be locked. What is pending will be cancelled (see outbox.take)."""
    row.status, row.status_reason = "disabled", reason
    row.updated_at = s.scalars(select(func.now())).one()
    told = {"reason": reason}
    audit.write(s, "webhook_endpoint.disabled", "webhook_endpoint", row.id, told, tenant_id=row.tenant_id)


def deliveries(
    s: Session,
    endpoint_id: str,
    *,
    after: str | None = None,
    before: str | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> tuple[Sequence[Logged], bool]:
    """(those to this endpoint, has_more)"""
    get(s, endpoint_id)
    rows = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    found, has_more = fetch_page(s, rows, WebhookDelivery.id, after=after, before=before, limit=limit, order=order)
    return logged(s, found), has_more


def logged(s: Session, found: Sequence[WebhookDelivery]) -> Sequence[Logged]:
    """In the same order."""
    messages = {row.message_id for row in found}
    types = dict(s.execute(select(WebhookMessage.id, WebhookMessage.type).where(WebhookMessage.id.in_(messages))).all())
    of_these = select(WebhookAttempt).where(WebhookAttempt.delivery_id.in_([row.id for row in found]))
    attempts = s.scalars(of_these.order_by(WebhookAttempt.delivery_id, WebhookAttempt.number)).all()
    by_delivery = {name: list(group) for name, group in groupby(attempts, key=lambda one: one.delivery_id)}
    return [Logged(row, types[row.message_id], by_delivery.get(row.id, [])) for row in found]


def opened(secrets: Secrets, endpoint_id: str, sealed: Sequence[str]) -> list[str]:
    """To sign with. Raises SealBroken."""
    return [secrets.open(_purpose(endpoint_id), one).decode() for one in sealed]


def _withdraw_answers(s: Session, endpoint_id: str) -> None:
    idempotency.withdraw(s, tenancy.tenant(s), f"webhook-endpoints/{endpoint_id}")


def _sealed(secrets: Secrets, endpoint_id: str, secret: str) -> str:
    return secrets.seal(_purpose(endpoint_id), secret.encode())


def _purpose(endpoint_id: str) -> str:
    return f"webhook {endpoint_id}"
