"""Connections, as the service and its workers have them: they outlast a restart of the database, and are what one asked for."""

import asyncio
import select
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from psycopg import OperationalError
from sqlalchemy import Connection, Engine, exc, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

from service.store import connection as store_connection
from service.store import session, workers
from service.store.session import Sessions, look, make_looks
from tests.abuse.proxy import SILENT, Proxy, proxy
from tests.conftest import owner

T = TypeVar("T")


def held(engine: Engine, count: int) -> list[Any]:
    """The pool's connections, so many, which are then in it again."""
    opened = [engine.connect() for _ in range(count)]
    found = [one.connection.driver_connection for one in opened]
    for one in opened:
        one.close()
    return found


def looked(database_url: str, course: Callable[[AsyncEngine], Coroutine[Any, Any, T]]) -> T:
    async def whole() -> T:
        looks = make_looks(database_url)
        try:
            return await course(looks)
        finally:
            await looks.dispose()

    return asyncio.run(whole())


def test_who_asks_after_a_restart_of_the_database_is_answered(engine: Engine, sessions: Sessions) -> None:
    before = held(engine, 3)
    with owner(sessions).connect() as connection:
        mine = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ANY (:pids)")
        connection.execute(mine, {"pids": [one.info.backend_pid for one in before]})
        connection.commit()
    for one in before:  # the server's farewell is on its way
        assert select.select([one.fileno()], [], [], 10)[0]
    for _ in before:
        with sessions.begin() as s:
            assert s.scalar(text("SELECT 1")) == 1
    assert all(one.closed for one in before)


def test_a_connection_that_was_just_opened_is_taken_whatever_the_server_says(
    engine: Engine, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a restart would use up the attempts that SQLAlchemy makes, and the caller would be told of a bug."""
    refused = 0

    class Talkative:
        def register(self, *_: object) -> None: ...

        def poll(self, _: int) -> list[int]:
            nonlocal refused
            refused += 1
            return [1]

    held(engine, 1)
    monkeypatch.setattr(session, "select", SimpleNamespace(poll=Talkative, POLLIN=select.POLLIN))
    with sessions.begin() as s:
        assert s.scalar(text("SELECT 1")) == 1
    assert refused == 1, "the kept one; the new one is not asked"


def test_who_is_frozen_in_the_midst_of_a_statement_holds_no_row_for_ever(engine: Engine, sessions: Sessions) -> None:
    with sessions.begin() as s:
        assert s.scalar(text("SHOW transaction_timeout")) == "1min"
    with engine.connect() as connection:
        frozen: Any = connection.connection.driver_connection
        for name in ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"):
            frozen.execute(f"SET {name} = '500ms'")
        frozen.commit()
        with suppress(OperationalError), frozen.pipeline():  # as many rows of one INSERT are sent: the end is told last
            frozen.execute("SELECT 1 FROM tenants FOR UPDATE")
            frozen.pgconn.send_flush_request()
            frozen.pgconn.flush()
            with sessions.begin() as s:  # waits for the lock, not for as long as lock_timeout
                assert s.scalars(text("SELECT 1 FROM tenants FOR UPDATE")).all()
        connection.invalidate()


@pytest.mark.parametrize("name", ["idle_in_transaction_session_timeout", "transaction_timeout"])
def test_who_wakes_up_after_the_server_has_ended_his_transaction_may_ask_again(
    engine: Engine, sessions: Sessions, name: str
) -> None:
    with engine.connect() as connection:
        connection.execute(text(f"SET {name} = '100ms'"))
        connection.commit()
        connection.execute(text("SELECT 1"))
        held: Any = connection.connection.driver_connection
        assert select.select([held.fileno()], [], [], 10)[0], "the server's farewell"
        with pytest.raises(exc.OperationalError, match="terminating connection") as raised:
            connection.execute(text("SELECT 2"))
        assert raised.value.connection_invalidated
    with sessions.begin() as s:
        assert s.scalar(text("SELECT 1")) == 1
    with engine.connect() as connection, pytest.raises(exc.InternalError):  # one that is not its end stays what it is
        connection.execute(text("DO $$ BEGIN RAISE 'no' USING ERRCODE = 'XX000'; END $$"))


def test_a_connection_that_lives_is_taken_again(engine: Engine, sessions: Sessions) -> None:
    before = {one.info.backend_pid for one in held(engine, 3)}
    for _ in range(4):
        with sessions.begin() as s:
            assert s.scalar(text("SELECT pg_backend_pid()")) in before


def test_each_statement_of_a_look_is_a_transaction_of_its_own(database_url: str, sessions: Sessions) -> None:
    def question(connection: Connection) -> list[float]:
        now = "SELECT extract(epoch FROM clock_timestamp() - now())::float8"  # since its transaction began
        connection.execute(text("INSERT INTO workers (name, gpu_classes, vram_gib, slots) VALUES ('kept', '[]', 0, 1)"))
        return [connection.scalars(text(f"{now} FROM pg_sleep({pause})")).one() for pause in (0.2, 0)]

    slow, quick = looked(database_url, lambda looks: look(looks, question))
    assert quick < 0.2 <= slow
    with sessions() as s:
        assert [one.name for one in workers.known(s)] == ["kept"]


def test_a_look_that_takes_long_keeps_nobody_waiting(database_url: str) -> None:
    done: list[str] = []

    async def asks(looks: AsyncEngine, name: str, seconds: float) -> None:
        await look(looks, lambda connection: connection.execute(text(f"SELECT pg_sleep({seconds})")))
        done.append(name)

    async def course(looks: AsyncEngine) -> None:
        await asyncio.gather(asks(looks, "slow", 0.5), *(asks(looks, "quick", 0) for _ in range(50)))

    looked(database_url, course)
    assert done == ["quick"] * 50 + ["slow"]


def test_who_looks_after_a_restart_of_the_database_is_answered(database_url: str, sessions: Sessions) -> None:
    def pid(connection: Connection) -> int:
        return connection.scalars(text("SELECT pg_backend_pid() FROM pg_sleep(0.1)")).one()

    async def course(looks: AsyncEngine) -> tuple[set[int], ...]:
        async def three() -> set[int]:
            return set(await asyncio.gather(*(look(looks, pid) for _ in range(3))))

        before, again = await three(), await three()
        with owner(sessions).connect() as connection:
            connection.execute(
                text("SELECT pg_terminate_backend(pid, 10000) FROM unnest(:pids) AS pid"), {"pids": [*before]}
            )
        return before, again, await three()

    before, again, after = looked(database_url, course)
    assert len(before) == 3
    assert again == before
    assert not after & before


def test_a_look_that_is_given_up_leaves_its_answer_to_nobody(database_url: str) -> None:
    def answer(connection: Connection, number: int, seconds: float) -> int:
        return connection.scalars(text(f"SELECT {number} FROM pg_sleep({seconds})")).one()

    async def course(looks: AsyncEngine) -> list[int]:
        more_than_fit = range(8)
        given_up = [asyncio.create_task(look(looks, answer, -number, 2)) for number in more_than_fit]
        await asyncio.sleep(0.3)
        for one in given_up:
            one.cancel()
        ended = await asyncio.gather(*given_up, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended)
        return [await look(looks, answer, number, 0) for number in range(20)]

    assert looked(database_url, course) == [*range(20)]


@pytest.fixture
def silenced(database_url: str) -> Iterator[tuple[str, Proxy]]:
    """The database through a proxy, which can make it fall silent."""
    url = make_url(database_url)
    with proxy(Path(str(url.query["host"])) / ".s.PGSQL.5432") as between:
        there = url.set(host="127.0.0.1", port=between.port, query={})
        yield there.render_as_string(hide_password=False), between


def test_a_server_that_takes_what_is_sent_and_says_nothing_is_given_up(
    silenced: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, between = silenced
    monkeypatch.setattr(store_connection, "SILENT_S", 0.3)
    engine = session.make_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
        with between.fault(SILENT), pytest.raises(exc.OperationalError, match="did not answer within") as raised:
            connection.scalar(text("SELECT 2"))
        assert raised.value.connection_invalidated
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 3")) == 3
    engine.dispose()


def test_so_does_a_look(silenced: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    url, between = silenced
    monkeypatch.setattr(store_connection, "LOOK_S", 0.3)

    def ask(connection: Connection, number: int) -> Any:
        return connection.scalar(text(f"SELECT {number}"))

    async def course(looks: AsyncEngine) -> Any:
        assert await look(looks, ask, 1) == 1
        with between.fault(SILENT), pytest.raises(exc.OperationalError, match="did not answer within"):
            await look(looks, ask, 2)
        return await look(looks, ask, 3)

    assert looked(url, course) == 3
