"""The engine and its sessions. One transaction per `with sessions.begin() as s:`; short, never held over a wait."""

import json
import math
import select
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import Session, sessionmaker

from service.store.tenancy import TenantSession

Sessions = sessionmaker[Session]

# A statement that hangs, or a transaction that somebody forgot, must not hold a job's row for ever.
TIMEOUTS = "-c statement_timeout=30s -c lock_timeout=10s -c idle_in_transaction_session_timeout=15s -c timezone=UTC"

# A network that drops packets is noticed within seconds, not after the system's quarter of an hour (libpq's names).
DEAD_PEER = {"tcp_user_timeout": 10_000, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}


def make_engine(database_url: str) -> Engine:
    """Connects lazily. A connection that died with a restarted database costs nobody a request."""
    engine = create_engine(
        database_url,
        pool_size=5,
        max_overflow=20,
        pool_timeout=10,
        connect_args={"options": TIMEOUTS, "connect_timeout": 5, "application_name": "unlearn", **DEAD_PEER},
        hide_parameters=True,  # a failed statement is logged; who asked for what to be forgotten is not
        json_serializer=to_json,
    )
    event.listen(engine, "checkout", _refuse_dead)
    return engine


def _refuse_dead(connection: Any, *_: object) -> None:
    """As `pool_pre_ping`, without its round trip: to one that waits, a server says nothing but that it ends."""
    if not connection.closed:
        heard = select.poll()
        heard.register(connection.fileno(), select.POLLIN)
    if connection.closed or heard.poll(0):
        raise InvalidatePoolError


def make_sessions(engine: Engine) -> Sessions:
    """Rows stay readable after the commit: an endpoint answers with them. They see every tenant (see tenancy.py)."""
    return sessionmaker(engine, class_=TenantSession, expire_on_commit=False)


@contextmanager
def looking(sessions: Sessions) -> Iterator[Session]:
    """For reads that need no transaction: each statement is one, without the round trips of BEGIN and COMMIT."""
    with sessions(bind=_autocommit(sessions.kw["bind"])) as s:
        yield s


@lru_cache(maxsize=8)
def _autocommit(engine: Engine) -> Engine:
    """Over the same connections. Kept: to make it takes longer than a look."""
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def at_most(s: Session, seconds: float) -> None:
    """No statement of this transaction takes longer: for what must answer soon or not at all."""
    s.execute(text("SELECT set_config('statement_timeout', :limit, true)"), {"limit": f"{seconds * 1000:.0f}ms"})


def to_json(value: Any) -> str:
    """JSON as Postgres takes it: a loss that blew up (nan, inf) becomes null, and no string carries NUL."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case str():
            return value.replace("\0", "\ufffd")
        case dict():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value


def schema_revision(s: Session) -> str | None:
    """The revision to which the database was migrated; None: not at all. The code's is `tables.HEAD`."""
    if s.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    revision: str | None = s.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
