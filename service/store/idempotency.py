"""What was answered to a request that carried an Idempotency-Key, for whoever sends it again. The caller commits.

The answer is written in the transaction of what it tells of: neither is ever there without the other. It is sealed, for
it may hold a secret that is shown once.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.domain.errors import KeyInFlight, KeyReused
from service.store import tenancy
from service.store.secrets import Secrets
from service.store.tables import IdempotencyKey

KEPT = timedelta(hours=24)
COLUMNS = [IdempotencyKey.tenant_id, IdempotencyKey.principal, IdempotencyKey.route, IdempotencyKey.key]


class Asked(NamedTuple):
    """A request with a key: one with the same principal, route and key is the same request, or a mistake."""

    principal: str
    route: str  # method, path and query
    key: str
    fingerprint: str  # keyed digest of the body


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]


def begin(s: Session, asked: Asked) -> None:
    """Until the transaction ends, nobody else is within the same request. Raises KeyInFlight where somebody is."""
    name = "\n".join((tenancy.tenant(s), *asked[:3]))
    if not s.scalar(select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 1)))):
        raise KeyInFlight("a request with this Idempotency-Key is being answered; send it again in a moment")


def recall(s: Session, secrets: Secrets, asked: Asked) -> Answer | None:
    """None: it was not answered within the last day. Raises KeyReused if what was answered had another body."""
    same = select(IdempotencyKey).where(
        IdempotencyKey.principal == asked.principal,
        IdempotencyKey.route == asked.route,
        IdempotencyKey.key == asked.key,
        IdempotencyKey.created_at > func.now() - KEPT,
    )
    row = s.scalar(same)
    if row is None:
        return None
    if row.fingerprint != asked.fingerprint:
        raise KeyReused("this Idempotency-Key came with another body; a new request needs a new key")
    return Answer(row.status, secrets.open(_purpose(asked), row.body), row.headers)


def keep(s: Session, secrets: Secrets, asked: Asked, answer: Answer) -> None:
    """After `begin` and a `recall` that found nothing: a row that is there all the same has expired."""
    told = {
        "fingerprint": asked.fingerprint,
        "status": answer.status,
        "body": secrets.seal(_purpose(asked), answer.body),
        "headers": dict(answer.headers),
    }
    key = {"principal": asked.principal, "route": asked.route, "key": asked.key}
    row = insert(IdempotencyKey).values(tenant_id=tenancy.tenant(s), **key, **told)
    s.execute(row.on_conflict_do_update(index_elements=COLUMNS, set_=told | {"created_at": func.now()}))


def forget(s: Session) -> int:
    """Those that have expired, of every tenant where the session is not bound. How many."""
    old = delete(IdempotencyKey).where(IdempotencyKey.created_at <= func.now() - KEPT)
    return len(s.scalars(old.returning(IdempotencyKey.key), execution_options={"synchronize_session": False}).all())


def withdraw(s: Session, tenant_id: str, place: str) -> None:
    """What was answered of an object that is gone, or with a secret that is: who makes it again, makes another.

    Args:
        place: the object's collection and id, as paths of the API end: the answers are that which made it, and those
            to requests below it.
    """
    made = IdempotencyKey.headers["Location"].astext.endswith(f"/{place}", autoescape=True)
    below = IdempotencyKey.route.contains(f"/{place}/", autoescape=True)
    gone = delete(IdempotencyKey).where(IdempotencyKey.tenant_id == tenant_id, or_(made, below))
    s.execute(gone, execution_options={"synchronize_session": False})


def _purpose(asked: Asked) -> str:
    return f"answer {' '.join(asked[:3])}"
