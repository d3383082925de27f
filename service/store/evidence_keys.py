"""The deployment's signing keys: one signs, those before it stay published. The caller commits."""

from collections.abc import Sequence
from threading import Event
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.evidence import keys
from service.evidence.keys import SigningKey
from service.store import audit, tables
from service.store.secrets import SealBroken, Secrets
from service.store.session import Sessions
from service.store.tenants import DEFAULT


class WrongMasterKey(RuntimeError):
    """Of a deployment."""


CHECK_AGAIN_S = 1.0
IN_USE = tables.SigningKey.retired_at.is_(None)


def active(s: Session, secrets: Secrets) -> SigningKey:
    """The one that signs; the first call makes it. Raises SealBroken where the master key is another one."""
    row = s.scalar(select(tables.SigningKey).where(IN_USE))
    if row is None:
        _alone(s)
        row = s.scalar(select(tables.SigningKey).where(IN_USE)) or _make(s, secrets)
    return _opened(secrets, row)


def check_master_key(sessions: Sessions, secrets: Secrets) -> bool:
    """Whether it could be checked: not while the database is away or not migrated. The first call makes what later ones open.

    Raises WrongMasterKey where what is stored was sealed under another one.
    """
    try:
        with sessions.begin() as s:
            active(s, secrets)
    except SealBroken as error:
        raise WrongMasterKey(
            "MASTER_KEY is not the one under which this database's keys were sealed: no API key would be recognised, and no "
            "stored set could be read"
        ) from error
    except SQLAlchemyError:
        return False
    return True


def await_master_key(sessions: Sessions, secrets: Secrets, stop: Event) -> None:
    """Returns once it was checked, however long the database is away, or when `stop` is set. Raises WrongMasterKey."""
    while not check_master_key(sessions, secrets):
        if stop.wait(CHECK_AGAIN_S):
            return


def of_id(s: Session, secrets: Secrets, key_id: str) -> SigningKey:
    """The one that signs or one before it, as only who has the master key can have stored it. Raises SealBroken."""
    return _opened(secrets, s.get_one(tables.SigningKey, key_id))


def rotate(s: Session, secrets: Secrets) -> str:
    """Another key signs from now on; its id. What was signed stays valid: its key stays published."""
    _alone(s)
    s.execute(update(tables.SigningKey).where(IN_USE).values(retired_at=func.now()))
    made = _make(s, secrets).id
    audit.write(s, "signing_key.rotated", "signing_key", made, tenant_id=DEFAULT)
    return made


def every(s: Session) -> Sequence[tables.SigningKey]:
    """The first one first."""
    return s.scalars(select(tables.SigningKey).order_by(tables.SigningKey.created_at, tables.SigningKey.id)).all()


def published(s: Session) -> dict[str, Any]:
    """The JWKS of all that ever signed."""
    return dict(keys.jwks(row.public_jwk for row in every(s)))


def _make(s: Session, secrets: Secrets) -> tables.SigningKey:
    key = keys.generate()
    row = tables.SigningKey(
        id=key.id,
        public_jwk=keys.jwk(key.private.public_key()),
        sealed_private=secrets.seal(_purpose(key.id), key.private.private_bytes_raw()),
    )
    s.add(row)
    s.flush()
    return row


def _opened(secrets: Secrets, row: tables.SigningKey) -> SigningKey:
    return keys.from_private_bytes(secrets.open(_purpose(row.id), row.sealed_private))


def _alone(s: Session) -> None:
    """Until the commit: two that found no key do not make two."""
    s.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("signing keys", 0))))


def _purpose(key_id: str) -> str:
    return f"signing key {key_id}"
