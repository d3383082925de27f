"""API keys. The secret is made here, returned once, and kept only as a keyed digest. The caller commits.

ulk_<8 characters>_<43 characters>_<6 characters>: what finds the row; 256 random bits; a checksum of the rest, by which
a mistyped key, or a string that a scanner took for one, is known without a look into the database.
"""

import re
import secrets as random
import zlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from hmac import compare_digest
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, bindparam, func, or_, select, update
from sqlalchemy.exc import InternalError
from sqlalchemy.orm import Session

from service.domain.errors import FieldProblem, InvalidRequest, NotFound
from service.domain.identity import Principal, Scope
from service.store import audit, idempotency, tenancy
from service.store.ids import new_id
from service.store.paging import Order, fetch_page
from service.store.secrets import Secrets
from service.store.session import READ_ONLY
from service.store.tables import ApiKey

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FORM = re.compile(r"(?P<body>ulk_[0-9A-Za-z]{8}_[0-9A-Za-z]{43})_(?P<check>[0-9A-Za-z]{6})")
PURPOSE = "api-keys"
USED_EVERY = timedelta(minutes=1)  # a poll must not be a write
LONG_AGO = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < func.now() - USED_EVERY)
# Made once: each request asks it, and to put it together takes longer than the answer.
LIVE = select(
    *(ApiKey.id.label("key_id"), ApiKey.digest.label("key_digest"), ApiKey.tenant_id, ApiKey.scopes),
    LONG_AGO.label("long_ago"),
).where(
    ApiKey.prefix == bindparam("prefix"),
    ApiKey.revoked_at.is_(None),
    or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()),
)


class NewKey(NamedTuple):
    row: ApiKey
    secret: str


class Recognised(NamedTuple):
    principal: Principal
    row: Any  # of the statement that was asked


def create(
    s: Session,
    secrets: Secrets,
    *,
    name: str,
    scopes: Collection[Scope],
    expires_at: datetime | None = None,
    maker: Principal | None = None,
    token_key_max: timedelta = timedelta(0),
) -> NewKey:
    """For the tenant that the session is bound to. Raises InvalidRequest for a scope or a time that its maker has not.

    Args:
        maker: None: an administrator on the deployment's machine.
        token_key_max: how long a key lives at most that a person's token makes, which itself ends in minutes; 0: there is none.
    """
    if maker is not None and (more := maker.lacks(frozenset(scopes))):
        detail = f"a key makes only keys with scopes of its own; it lacks: {', '.join(sorted(more))}"
        raise InvalidRequest(FieldProblem("/scopes", detail, "scope"))
    if maker is not None:
        _check_end(s, maker, expires_at, token_key_max)
    prefix = f"ulk_{_random(8)}"
    body = f"{prefix}_{_random(43)}"
    secret = f"{body}_{_check(body)}"
    row = ApiKey(
        id=new_id("key"),
        name=name,
        prefix=prefix,
        digest=secrets.digest(PURPOSE, secret.encode()),
        scopes=sorted(scopes),
        created_by=tenancy.actor(s),
        expires_at=expires_at,
    )
    s.add(row)
    s.flush()
    s.refresh(row)
    audit.write(s, "key.created", "api_key", row.id, {"name": name, "scopes": row.scopes, "prefix": prefix})
    return NewKey(row, secret)


def well_formed(secret: str) -> bool:
    """Whether it may be a key: told without a look into the database."""
    form = FORM.fullmatch(secret)
    return form is not None and _check(form["body"]) == form["check"]


def recognise(
    connection: Connection, secrets: Secrets, secret: str, live: Select[*tuple[Any, ...]] = LIVE, **given: str
) -> Recognised | None:
    """Whose secret it is, of whatever tenant; None: nobody's, or of a key that is revoked or has expired.

    Args:
        secret: one that is well_formed.
        live: LIVE, or that with columns of something else that is looked for at once, as its other parameters say.
    """
    row = connection.execute(live, {"prefix": secret[: len("ulk_") + 8], **given}).one_or_none()
    if row is None or not compare_digest(row.key_digest, secrets.digest(PURPOSE, secret.encode())):
        return None
    if row.long_ago:
        _note_use(connection, row.key_id)
    return Recognised(Principal(row.key_id, row.tenant_id, frozenset(map(Scope, row.scopes))), row)


def _note_use(connection: Connection, key_id: str) -> None:
    """Unless the database takes no writes, or somebody else notes it."""
    free = select(ApiKey.id).where(ApiKey.id == key_id, LONG_AGO).with_for_update(skip_locked=True)
    try:
        connection.execute(update(ApiKey).where(ApiKey.id.in_(free)).values(last_used_at=func.now()))
    except InternalError as error:
        if getattr(error.orig, "sqlstate", None) != READ_ONLY:
            raise


def get(s: Session, key_id: str) -> ApiKey:
    row = s.get(ApiKey, key_id)
    if row is None:
        raise NotFound("API key", key_id)
    return row


def page(
    s: Session, *, after: str | None = None, before: str | None = None, limit: int = 20, order: Order = "desc"
) -> tuple[Sequence[ApiKey], bool]:
    return fetch_page(s, select(ApiKey), ApiKey.id, after=after, before=before, limit=limit, order=order)


def revoke(s: Session, key_id: str) -> ApiKey:
    """From now on, for ever. To revoke twice is to revoke once."""
    row = s.scalar(select(ApiKey).where(ApiKey.id == key_id).with_for_update())
    if row is None:
        raise NotFound("API key", key_id)
    if row.revoked_at is None:
        row.revoked_at = s.scalar(select(func.now()))
        idempotency.withdraw(s, row.tenant_id, f"api-keys/{row.id}")  # it has the secret
        audit.write(s, "key.revoked", "api_key", row.id, {"name": row.name, "prefix": row.prefix})
    return row


def _check_end(s: Session, maker: Principal, expires_at: datetime | None, token_key_max: timedelta) -> None:
    """Raises InvalidRequest for a key that would outlive what its maker may make."""
    if maker.is_person:
        if not token_key_max:
            detail = "tokens make no keys in this deployment (OIDC_KEY_MAX_S): a key with keys:manage does"
            raise InvalidRequest(FieldProblem("", detail, "token"))
        latest = datetime.now(UTC) + token_key_max
        hours = token_key_max.total_seconds() / 3600
        rule = f"a token makes only keys that expire within {hours:g} h (OIDC_KEY_MAX_S), by now no later than"
    else:
        latest = s.scalar(select(ApiKey.expires_at).where(ApiKey.id == maker.id))
        rule = "a key makes only keys that expire no later than itself,"
    if latest is not None and (expires_at is None or expires_at > latest):
        raise InvalidRequest(FieldProblem("/expires_at", f"{rule} {latest:%Y-%m-%d %H:%M:%S} UTC", "late"))


def _random(length: int) -> str:
    return "".join(random.choice(DIGITS) for _ in range(length))


def _check(body: str) -> str:
    number, check = zlib.crc32(body.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, len(DIGITS))
        check = DIGITS[digit] + check
    return check
