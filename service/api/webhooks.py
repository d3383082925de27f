"""Webhooks: where a tenant is told, with which secret, and the log of what was tried. Standard Webhooks 1.0."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from service.api.deps import Here, Page, PageQuery, Parts, Reads, link_next, page
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.api.once import OnceOnly
from service.domain.errors import FieldProblem, InvalidRequest
from service.domain.identity import Scope
from service.domain.job import Strict
from service.store import outbox, webhooks
from service.store.tables import WebhookDelivery, WebhookEndpoint
from service.store.webhooks import Logged
from service.webhooks import guard
from service.webhooks.events import EventType

ENDPOINTS_PATH = "/v1/webhook-endpoints"
router = APIRouter(tags=["webhooks"], route_class=Guarded)
MANAGE = needs(Scope.WEBHOOKS_MANAGE)
NO_STORE = {"Cache-Control": "no-store"}


class EndpointCreate(Strict):
    url: str = Field(
        min_length=1,
        max_length=2048,
        description="https, and at public addresses, unless the deployment allows more",
        examples=["https://93.184.215.14/unlearning"],
    )
    description: str = Field(default="", max_length=255, description="for people")
    event_types: list[EventType] = Field(
        default_factory=list, max_length=len(EventType), description="what it wants to be told; none: everything"
    )


class EndpointObject(BaseModel):
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    url: str
    description: str
    event_types: list[str]
    status: str = Field(description="enabled or disabled; one that takes nothing for days is disabled")
    status_reason: str | None
    failing_since: datetime | None = Field(description="null: it took what it was sent last")
    old_secret_until: datetime | None = Field(description="until then the secret before the present one signs, too")
    created_by: str
    created_at: datetime
    updated_at: datetime


class NewSecretObject(EndpointObject):
    secret: str = Field(description="whsec_...: signs each call; shown once, or again with the same Idempotency-Key")


class DeliveryAttempt(BaseModel):
    number: int
    at: datetime
    status: int | None = Field(description="of HTTP; null: no answer")
    latency_ms: int
    reply: str = Field(description="how the answer's body began, at most 1,000 bytes")
    error: str | None = Field(description="null: delivered")


class DeliveryObject(BaseModel):
    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    endpoint_id: str
    message_id: str = Field(description="`webhook-id` of each attempt, and of a replay")
    type: str
    status: str = Field(description="pending, delivered, failed, or cancelled because the endpoint was disabled")
    next_at: datetime | None = Field(description="when it is tried again; null: no more")
    created_at: datetime
    finished_at: datetime | None
    attempts: list[DeliveryAttempt]


@router.post(
    ENDPOINTS_PATH,
    status_code=201,
    summary="Make an endpoint",
    dependencies=[MANAGE, Depends(Reads("application/json"))],
    responses=declared(400, 409, 413, 415, 503),
)
def create(here: Here, once: OnceOnly, asked: EndpointCreate, response: Response) -> NewSecretObject:
    """A call is a POST with a body of type, time and the object's id and status alone; fetch the rest with a key.

    Verify its signature (`webhook-id`, `webhook-timestamp`, `webhook-signature`) with the secret and any library of
    Standard Webhooks. Answer 2xx soon; all else is tried again, ten times over three days. One message may come twice:
    `webhook-id` tells. Its URL cannot be changed: make another endpoint, delete this one.
    """
    _judge(here, asked.url)
    with here.sessions.begin() as s:
        once.first(s)
        made = webhooks.create(s, here.secrets, **asked.model_dump())
        answer = _with_secret(made)
        headers = {"Location": f"{ENDPOINTS_PATH}/{made.row.id}", **NO_STORE}
        once.keep(s, answer, headers)
    response.headers.update(headers)
    return answer


@router.get(ENDPOINTS_PATH, summary="List endpoints", dependencies=[MANAGE], responses=declared(503))
def list_endpoints(
    here: Here, query: Annotated[PageQuery, Query()], request: Request, response: Response
) -> Page[EndpointObject]:
    with here.sessions.begin() as s:
        found, has_more = webhooks.page(s, **query.model_dump())
    answer = page([_endpoint(row) for row in found], [row.id for row in found], has_more)
    link_next(request, response, query, answer)
    return answer


@router.get(
    ENDPOINTS_PATH + "/{endpoint_id}", summary="One endpoint", dependencies=[MANAGE], responses=declared(404, 503)
)
def get(here: Here, endpoint_id: str) -> EndpointObject:
    with here.sessions.begin() as s:
        return _endpoint(webhooks.get(s, endpoint_id))


@router.delete(
    ENDPOINTS_PATH + "/{endpoint_id}",
    status_code=204,
    summary="Delete an endpoint",
    dependencies=[MANAGE],
    responses=declared(404, 503),
)
def delete(here: Here, endpoint_id: str) -> None:
    """With the log of its deliveries; what it was still to be told, it is not."""
    with here.sessions.begin() as s:
        webhooks.delete(s, endpoint_id)


@router.post(
    ENDPOINTS_PATH + "/{endpoint_id}/rotate-secret",
    summary="Give it another secret",
    dependencies=[MANAGE],
    responses=declared(404, 409, 503),
)
def rotate_secret(here: Here, once: OnceOnly, endpoint_id: str, response: Response) -> NewSecretObject:
    """For a day, calls are signed with the old one, too: a receiver that knows either accepts them."""
    with here.sessions.begin() as s:
        once.first(s)
        answer = _with_secret(webhooks.rotate(s, here.secrets, endpoint_id))
        once.keep(s, answer, NO_STORE, status=200)
    response.headers.update(NO_STORE)
    return answer


@router.post(
    ENDPOINTS_PATH + "/{endpoint_id}/enable",
    summary="Enable one that was disabled",
    dependencies=[MANAGE],
    responses=declared(404, 503),
)
def enable(here: Here, endpoint_id: str) -> EndpointObject:
    """It is told what happens from now on; what it missed is in its deliveries, to be replayed."""
    with here.sessions.begin() as s:
        return _endpoint(webhooks.enable(s, endpoint_id))


@router.post(
    ENDPOINTS_PATH + "/{endpoint_id}/test",
    status_code=202,
    summary="Send it a test",
    dependencies=[MANAGE],
    responses=declared(404, 409, 503),
)
def test(here: Here, once: OnceOnly, endpoint_id: str) -> DeliveryObject:
    """`webhook.test`, within a second or so; its deliveries tell how that went."""
    with here.sessions.begin() as s:
        once.first(s)
        answer = _one_delivery(s, outbox.enqueue_test(s, endpoint_id))
        once.keep(s, answer, {}, status=202)
    return answer


@router.get(
    ENDPOINTS_PATH + "/{endpoint_id}/deliveries",
    summary="What it was sent",
    dependencies=[MANAGE],
    responses=declared(404, 503),
)
def deliveries(
    here: Here, endpoint_id: str, query: Annotated[PageQuery, Query()], request: Request, response: Response
) -> Page[DeliveryObject]:
    """With each attempt; for thirty days."""
    with here.sessions.begin() as s:
        found, has_more = webhooks.deliveries(s, endpoint_id, **query.model_dump())
    answer = page(_deliveries(found), [one.delivery.id for one in found], has_more)
    link_next(request, response, query, answer)
    return answer


@router.post(
    "/v1/webhook-deliveries/{delivery_id}/replay",
    status_code=202,
    summary="Deliver a message again",
    dependencies=[MANAGE],
    responses=declared(404, 409, 503),
)
def replay(here: Here, once: OnceOnly, delivery_id: str) -> DeliveryObject:
    """Another delivery of the same message, with the same `webhook-id`, to the same endpoint."""
    with here.sessions.begin() as s:
        once.first(s)
        answer = _one_delivery(s, outbox.replay(s, delivery_id))
        once.keep(s, answer, {}, status=202)
    return answer


def _judge(here: Parts, url: str) -> None:
    """Again at each call, for names come to lead elsewhere. Raises InvalidRequest."""
    rules = guard.Rules(here.settings.webhook_allow_http, tuple(here.settings.webhook_networks))
    try:
        guard.pin(url, rules)
    except guard.AddressRefused as error:
        raise InvalidRequest(FieldProblem("/url", str(error), "address")) from error


def _endpoint(row: WebhookEndpoint) -> EndpointObject:
    return EndpointObject.model_validate(row, from_attributes=True)


def _with_secret(made: webhooks.NewSecret) -> NewSecretObject:
    return NewSecretObject(**_endpoint(made.row).model_dump(), secret=made.secret)


def _one_delivery(s: Session, row: WebhookDelivery) -> DeliveryObject:
    [answer] = _deliveries(webhooks.logged(s, [row]))
    return answer


def _deliveries(found: Sequence[Logged]) -> list[DeliveryObject]:
    return [
        DeliveryObject(
            id=row.id,
            endpoint_id=row.endpoint_id,
            message_id=row.message_id,
            type=type_,
            status=row.status,
            next_at=row.next_at,
            created_at=row.created_at,
            finished_at=row.finished_at,
            attempts=[DeliveryAttempt.model_validate(one, from_attributes=True) for one in attempts],
        )
        for row, type_, attempts in found
    ]
