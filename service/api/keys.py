"""API keys: made, listed, revoked. The secret is in the answer to the making, and never again."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field

from service.api.deps import Here, Page, PageQuery, Reads, Who, link_next, page
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.api.once import OnceOnly
from service.domain.errors import FieldProblem, InvalidRequest
from service.domain.identity import ROLES, Scope
from service.domain.job import Strict, Time
from service.store import keys
from service.store.tables import ApiKey

KEYS_PATH = "/v1/api-keys"
router = APIRouter(prefix=KEYS_PATH, tags=["API keys"], route_class=Guarded)


class KeyCreate(Strict):
    name: str = Field(min_length=1, max_length=255, description="for people: whose it is, and for what")
    role: str | None = Field(default=None, max_length=64, description=f"{', '.join(ROLES)}: stands for its scopes")
    scopes: list[Scope] = Field(default_factory=list, max_length=len(Scope), description="beside those of the role")
    expires_at: Time | None = Field(
        default=None, description="null: never, which only a key without an end may ask for"
    )


class KeyObject(BaseModel):
    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    prefix: str = Field(description="how the secret begins")
    scopes: list[str]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="to the minute")


class NewKeyObject(KeyObject):
    secret: str = Field(description="shown once, or again to who asks with the same Idempotency-Key")


@router.post(
    "",
    status_code=201,
    summary="Make a key",
    dependencies=[needs(Scope.KEYS_MANAGE), Depends(Reads("application/json"))],
    responses=declared(400, 409, 413, 415, 503),
)
def create(here: Here, who: Who, once: OnceOnly, request: KeyCreate, response: Response) -> NewKeyObject:
    """For the same tenant, with scopes that the key or token which makes it has itself, and no longer than a key that expires.

    A token makes only keys that expire soon: within a day, unless the deployment says otherwise. To rotate a key: make
    another, revoke it.
    """
    if request.role is not None and request.role not in ROLES:
        raise InvalidRequest(FieldProblem("/role", f"the roles are: {', '.join(ROLES)}", "enum"))
    scopes = frozenset(request.scopes) | ROLES.get(request.role or "", frozenset())
    if not scopes:
        raise InvalidRequest(
            FieldProblem("/scopes", "give a role or scopes: a key without any opens nothing", "missing")
        )
    if request.expires_at is not None and request.expires_at <= datetime.now(UTC) + timedelta(seconds=1):
        raise InvalidRequest(FieldProblem("/expires_at", "lies in the past", "past"))
    with here.sessions.begin() as s:
        once.first(s)
        made = keys.create(
            s,
            here.secrets,
            name=request.name,
            scopes=scopes,
            expires_at=request.expires_at,
            maker=who,
            token_key_max=timedelta(seconds=here.settings.oidc_key_max_s),
        )
        answer = NewKeyObject(**key_object(made.row).model_dump(), secret=made.secret)
        headers = {"Location": f"{KEYS_PATH}/{made.row.id}", "Cache-Control": "no-store"}
        once.keep(s, answer, headers)
    response.headers.update(headers)
    return answer


@router.get("", summary="List keys", dependencies=[needs(Scope.KEYS_MANAGE)], responses=declared(503))
def list_keys(
    here: Here, query: Annotated[PageQuery, Query()], request: Request, response: Response
) -> Page[KeyObject]:
    with here.sessions.begin() as s:
        found, has_more = keys.page(s, **query.model_dump())
    answer = page([key_object(row) for row in found], [row.id for row in found], has_more)
    link_next(request, response, query, answer)
    return answer


@router.get("/{key_id}", summary="One key", dependencies=[needs(Scope.KEYS_MANAGE)], responses=declared(404, 503))
def get(here: Here, key_id: str) -> KeyObject:
    with here.sessions.begin() as s:
        return key_object(keys.get(s, key_id))


@router.delete(
    "/{key_id}",
    status_code=204,
    summary="Revoke a key",
    dependencies=[needs(Scope.KEYS_MANAGE)],
    responses=declared(404, 503),
)
def revoke(here: Here, key_id: str) -> None:
    """At once and for ever; it stays in the list. To revoke twice is to revoke once."""
    with here.sessions.begin() as s:
        keys.revoke(s, key_id)


def key_object(row: ApiKey) -> KeyObject:
    return KeyObject.model_validate(row, from_attributes=True)
