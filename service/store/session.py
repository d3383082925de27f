"""The engine and its sessions. One transaction per `with sessions.begin() as s:`; short, never held over a wait."""

import json
import math
import select
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session, sessionmaker

from service.store.tenancy import TenantSession

Sessions = sessionmaker[Session]

# A statement that hangs, or a transaction that somebody forgot, must not hold a job's row for ever.
TIMEOUTS = "-c statement_timeout=30s -c lock_timeout=10s -c idle_in_transaction_session_timeout=15s -c timezone=UTC"

# A network that drops packets is noticed within seconds, not after the system's quarter of an hour (libpq's names).
DEAD_PEER = {"tcp_user_timeout": 10_000, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}


def make_engine(database_url: str) -> Engine:
    """Connects lazily. A connection that a restarted database has closed costs nobody a request.

    One whose peer vanished without a word does, until keepalive finds out. Raises RuntimeError for another URL than such a one.
    """
    try:
        engine = _engine(database_url)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise RuntimeError("DATABASE_URL is not such as postgresql+psycopg://USER@HOST/NAME") from error
    engine.dialect.do_ping = _lives  # type: ignore[method-assign]
    return engine


def _engine(database_url: str) -> Engine:
    return create_engine(
        database_url,
        pool_pre_ping=True,
        pool_size=5,
        max_overflow=20,
        pool_timeout=10,
        connect_args={"options": TIMEOUTS, "connect_timeout": 5, "application_name": "unlearn", **DEAD_PEER},
        hide_parameters=True,  # a failed statement is logged; who asked for what to be forgotten is not
        json_serializer=to_json,
    )


def _lives(dbapi_connection: Any) -> bool:
    """What `pool_pre_ping` asks, without a round trip: to one that waits, a server hardly says anything but that it ends."""
    if dbapi_connection.closed:
        return False
    heard = select.poll()
    heard.register(dbapi_connection.fileno(), select.POLLIN)
    return not heard.poll(0)


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
