"""The engine and its sessions. One transaction per `with sessions.begin() as s:`; short, never held over a wait.

Beside them the event loop's own connections, for what each request asks.
"""

import json
import math
import select
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy import Engine, ExceptionContext, create_engine, event, text
from sqlalchemy.exc import ArgumentError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from service.store.connection import Connection, LookConnection
from service.store.tenancy import TenantSession

T = TypeVar("T")
Sessions = sessionmaker[Session]

# The database is away, busy, or takes no writes: to be asked again later, for the same may succeed then.
AWAY = (OperationalError, InterfaceError, NoConnectionFree)
READ_ONLY = (
    "25006"  # SQLSTATE read_only_sql_transaction: a primary that became a standby, or a disk that is nearly full
)

# A statement that hangs, or a transaction that somebody forgot, must not hold a job's row for ever. Nor must a process that
# was frozen in the midst of a statement, such as between the rows of an INSERT: for its rest the server waits, and only
# transaction_timeout (Postgres 17) ends that.
TIMEOUTS = (
    "-c statement_timeout=30s -c lock_timeout=10s -c idle_in_transaction_session_timeout=15s -c transaction_timeout=60s "
    "-c timezone=UTC"
)

# A network that drops packets is noticed within seconds, not after the system's quarter of an hour (libpq's names). For a
# server that takes what is sent and says nothing, see connection.py.
DEAD_PEER = {"tcp_user_timeout": 10_000, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}

CONNECT: dict[str, Any] = {"options": TIMEOUTS, "connect_timeout": 5, "application_name": "unlearn", **DEAD_PEER}

LOOK = {"options": f"{TIMEOUTS} -c statement_timeout=5s", "async_creator_fn": LookConnection.connect}

OPTIONS: dict[str, Any] = {
    "pool_pre_ping": True,
    "pool_timeout": 10,
    "connect_args": CONNECT,
    "hide_parameters": True,  # a failed statement is logged; who asked for what to be forgotten is not
}


def make_engine(database_url: str) -> Engine:
    """Connects lazily. A connection that a restarted database has closed costs nobody a request.

    One whose peer vanished without a word does, until keepalive finds out. Raises RuntimeError for another URL than such a one.
    """
    try:
        engine = create_engine(database_url, pool_size=10, max_overflow=15, json_serializer=to_json, **OPTIONS)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise RuntimeError("DATABASE_URL is not such as postgresql+psycopg://USER@HOST/NAME") from error
    _ping_without_asking(engine)
    event.listen(engine, "do_connect", _connect)
    event.listen(engine, "handle_error", _away, retval=True)
    return engine


def make_looks(database_url: str) -> AsyncEngine:
    """What `look` looks through. Connects lazily, as make_engine does.

    A statement of a look is given up after 5 s, so that none that hangs holds one of the few connections for long. Who
    waits for one that others hold is refused after 2 s: looks take milliseconds.
    """
    looks = create_async_engine(
        database_url,
        pool_size=5,
        max_overflow=0,
        isolation_level="AUTOCOMMIT",
        pool_reset_on_return=None,  # there is never a transaction to end
        **OPTIONS | {"pool_timeout": 2, "connect_args": CONNECT | LOOK},
    )
    _ping_without_asking(looks.sync_engine)
    return looks


async def look(looks: AsyncEngine, question: Callable[..., T], *given: Any) -> T:
    """What `question(connection, *given)` finds, asked on the event loop; for what needs no transaction.

    Each statement is a transaction of its own, without the round trips of BEGIN and COMMIT, and waits for no thread.
    The connection sees every tenant: a question names its own.
    """

    def turn() -> T:
        with looks.sync_engine.connect() as connection:
            return question(connection, *given)

    return await greenlet_spawn(turn)  # AsyncConnection would take one to connect, one to ask, and one to close


def _connect(_dialect: Any, _record: Any, given: Sequence[Any], named: dict[str, Any]) -> Connection:
    return Connection.connect(*given, **named)


def _ping_without_asking(engine: Engine) -> None:
    dialect = engine.dialect

    def lives(dbapi_connection: Any) -> bool:
        return _lives(dialect.get_driver_connection(dbapi_connection))

    dialect.do_ping = lives  # type: ignore[method-assign]


def _away(context: ExceptionContext) -> OperationalError | None:
    """A server that has ended the connection is away: psycopg calls its timeouts internal errors.

    One that takes no writes is, too. Its connections are given up: after a failover a new one leads to the server that does.
    """
    error = context.sqlalchemy_exception
    if not isinstance(error, InternalError) or error.orig is None:
        return None
    if getattr(error.orig, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True
    if not context.is_disconnect:
        return None
    return OperationalError(error.statement, None, error.orig, hide_parameters=True, connection_invalidated=True)


def _lives(connection: Any) -> bool:
    """What `pool_pre_ping` asks, without a round trip: to one that waits, a server hardly says anything but that it ends."""
    if connection.closed:
        return False
    heard = select.poll()
    heard.register(connection.fileno(), select.POLLIN)
    return not heard.poll(0)


def make_sessions(engine: Engine) -> Sessions:
    """Rows stay readable after the commit: an endpoint answers with them. They see every tenant (see tenancy.py)."""
    return sessionmaker(engine, class_=TenantSession, expire_on_commit=False)


def takes_writes(s: Session) -> bool:
    read_only: str | None = s.scalar(text("SHOW transaction_read_only"))
    return read_only == "off"


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


def schema_fits(s: Session, head: str) -> bool:
    """Whether code whose own revision is `head` works with the schema: it is that one, or a later one that says so.

    During a rolling upgrade the schema is the new one while the code before it still runs. See service.migrate.
    """
    revision = schema_revision(s)
    if revision is None or revision == head:
        return revision == head
    oldest_code: str | None = s.scalar(text("SELECT obj_description('alembic_version'::regclass, 'pg_class')"))
    return revision > head and oldest_code is not None and oldest_code <= head
