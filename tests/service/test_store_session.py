"""Connections, as the service and its workers have them: they outlast a restart of the database, and are what one asked for."""

import select
import time
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, text

from service.store import session, tenants
from service.store.session import Sessions, looking
from tests.conftest import owner


def held(engine: Engine, count: int) -> list[Any]:
    """The pool's connections, so many, which are then in it again."""
    opened = [engine.connect() for _ in range(count)]
    found = [one.connection.driver_connection for one in opened]
    for one in opened:
        one.close()
    return found


def test_who_asks_after_a_restart_of_the_database_is_answered(engine: Engine, sessions: Sessions) -> None:
    before = held(engine, 3)
    with owner(sessions).connect() as connection:
        mine = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ANY (:pids)")
        connection.execute(mine, {"pids": [one.info.backend_pid for one in before]})
        connection.commit()
    for one in before:  # the server's farewell is on its way
        assert select.select([one.fileno()], [], [], 10)[0]
    with sessions.begin() as s:
        assert s.scalar(text("SELECT 1")) == 1
    for _ in before:
        with looking(sessions) as s:
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


def test_a_connection_that_lives_is_taken_again(engine: Engine, sessions: Sessions) -> None:
    before = {one.info.backend_pid for one in held(engine, 3)}
    for _ in range(4):
        with sessions.begin() as s:
            assert s.scalar(text("SELECT pg_backend_pid()")) in before


def test_each_statement_of_a_look_is_a_transaction_of_its_own_and_of_no_other_session(sessions: Sessions) -> None:
    def now(s: Any) -> float:
        return float(s.scalar(text("SELECT extract(epoch FROM now())")))

    with looking(sessions) as s:
        first = now(s)
        time.sleep(0.01)
        assert now(s) > first
        tenants.add(s, "kept")
        s.flush()
    with sessions() as s:  # over the connection that the look had
        first = now(s)
        time.sleep(0.01)
        assert now(s) == first
        tenants.add(s, "dropped")
        s.flush()
    with sessions() as s:
        assert {"kept", "dropped"} & {one.id for one in tenants.every(s)} == {"kept"}
