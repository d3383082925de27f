"""The API killed between every two statements: what was asked for is there whole, or nothing of it is.

Each death is one by SIGKILL, of a process of its own that answers one request and ends itself at a place: before a
statement, before a COMMIT, after one, or with the answer in its hands. The places are not listed here. The first process
dies at the first place, the next at the second, until one comes through; so a new statement is a new place.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import redis
from fastapi import FastAPI
from sqlalchemy import Engine, event, text, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service import sweep
from service.app import create_app
from service.dispatch import queue_name
from service.orphans import delete_orphans
from service.processes import free_port, running, tail
from service.settings import Settings
from service.store import audit, files, jobs
from service.store.session import Sessions, make_sessions
from service.store.storage import Storage
from service.store.tables import AuditCheck, Base, Tenant
from service.store.tenants import DEFAULT
from tests.conftest import MASTER_KEY
from tests.service.conftest import JOBS, Bell

ENDPOINTS = "/v1/webhook-endpoints"
REQUESTS = "/v1/deletion-requests"
COMMITTED, ANSWERED = "COMMIT is through", "the answer is there"
GONE_S = 10.0  # within which Postgres notices that a client is dead

FORKS = get_context("forkserver")  # of a process without threads, in which the service is imported already
FORKS.set_forkserver_preload([__name__])


class Asked(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None = None


class Death(NamedTuple):
    place: str | None  # None: nobody killed it
    added: Counter[str]  # rows, by table
    rung: int  # bells

    @property
    def whole(self) -> bool:
        return bool(self.added)


def nursery(settings: Settings, orders: Connection) -> None:
    """Answers the first that it is asked itself, which makes everything ready, and each other one in a fork that dies."""
    app, tell = create_app(settings), orders.send
    answer_until(app, orders.recv(), -1, tell)
    for place in count():
        asked = orders.recv()
        child = os.fork()
        if not child:
            try:
                answer_until(app, asked, place, tell)
                os._exit(0)
            finally:  # it must not come back into the loop
                os._exit(1)
        tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def answer_until(app: FastAPI, asked: Asked, place: int, tell: Callable[[str | None], None]) -> None:
    """Answers, and dies when it comes by this place, which it tells; None: it has not come by."""
    passed = count()

    def at(name: str) -> None:
        if next(passed) == place:
            tell(name)
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(
        Engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: at(" ".join(statement.split()[:3]))
    )
    event.listen(Engine, "commit", lambda _: at("COMMIT"))
    event.listen(Session, "after_commit", lambda _: at(COMMITTED))
    with TestClient(app) as http:
        reply = http.post(asked.path, headers=asked.headers, json=asked.body)
        assert reply.is_success, reply.text
        at(ANSWERED)
    tell(None)


@pytest.fixture
def deaths(settings: Settings, http: TestClient, sessions: Sessions) -> Callable[..., Iterator[Death]]:
    """deaths(ask) -> what each process left behind; ask(number) -> what it was asked. Nobody killed the first and the last."""

    def each(ask: Callable[[int], Asked]) -> Iterator[Death]:
        orders, theirs = FORKS.Pipe()
        process = FORKS.Process(target=nursery, args=(settings, theirs))
        process.start()
        theirs.close()
        try:
            for number in count():
                asked = ask(number)
                rows_before, bells_before = rows(sessions), bells(settings)
                orders.send(asked)
                died_at: str | None = orders.recv()
                if number:
                    assert orders.recv() == (0 if died_at is None else -signal.SIGKILL)
                yield Death(died_at, rows(sessions) - rows_before, bells(settings) - bells_before)
                if number and died_at is None:
                    return
        finally:
            process.kill()
            process.join()

    return each


def rows(sessions: Sessions) -> Counter[str]:
    tables = (table for table in Base.metadata.sorted_tables if table.name != AuditCheck.__tablename__)
    counts = ", ".join(f"(SELECT count(*) FROM {table.name}) AS {table.name}" for table in tables)
    with sessions() as s:
        return Counter(dict(s.execute(text(f"SELECT {counts}")).mappings().one()))


def bells(settings: Settings) -> int:
    with redis.Redis.from_url(settings.broker_url) as client:
        return int(client.llen(queue_name("any")))


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"rate_limit_per_minute": 0, "rate_limit_jobs_per_hour": 0})


@pytest.fixture
def headers(http: TestClient) -> dict[str, str]:
    return {"Authorization": http.headers["Authorization"]}


@pytest.fixture
def endpoints(http: TestClient) -> list[str]:
    """Two that want to know of what is created, and are told nothing else; a third wants to know other things."""
    created = ["unlearning.job.queued", "deletion_request.received", "deletion_request.approved"]
    ids = []
    for name, types in (("one", created), ("two", created), ("other", ["certificate.issued"])):
        url = f"https://93.184.216.34/{name}"
        reply = http.post(ENDPOINTS, json={"url": url, "event_types": types})
        assert reply.status_code == 201, reply.text
        ids.append(reply.json()["id"])
    return ids[:2]


def again(http: TestClient, asked: Asked) -> Any:
    """As a client does that got no answer: the same, until nobody else is within it."""
    until = time.monotonic() + GONE_S
    while True:
        reply = http.post(asked.path, headers=asked.headers, json=asked.body)
        in_flight = reply.status_code == 409 and "key-in-flight" in reply.json()["type"]
        if not in_flight or time.monotonic() > until:
            return reply
        time.sleep(0.01)


def whole_or_nothing(undisturbed: Death, *found: Death) -> None:
    """Nothing before one certain COMMIT is through; from there on all, which is what an undisturbed request leaves."""
    assert undisturbed.whole
    assert all(death.added in (Counter(), undisturbed.added) for death in found), found
    first = next(index for index, death in enumerate(found) if death.whole)
    assert not any(death.whole for death in found[:first])
    assert all(death.whole for death in found[first:])
    assert [death.place for death in found[first - 1 :]] == ["COMMIT", COMMITTED, ANSWERED, None]


def nothing_else_is_left(sessions: Sessions, settings: Settings) -> None:
    """The log holds, and the bytes of those that died before their COMMIT go with the orphans."""
    unbound, storage = make_sessions(sessions.kw["bind"]), Storage(settings.storage_url)
    assert audit.check(unbound, DEFAULT).fault is None
    stored = {key for key, _ in storage.ages(files.FOLDER)}
    with sessions() as s:
        named = files.named(s, stored)
    assert named < stored, "some have died between their bytes and their row"
    for key in stored:
        os.utime(Path(storage.root) / key, (0, 0))
    assert delete_orphans(unbound, storage) == len(stored - named)
    assert {key for key, _ in storage.ages(files.FOLDER)} == named


def test_a_job_is_there_with_all_that_belongs_to_it_or_not_at_all(
    deaths: Callable[..., Iterator[Death]],
    http: TestClient,
    headers: dict[str, str],
    endpoints: list[str],
    settings: Settings,
    sessions: Sessions,
    request_body: dict[str, Any],
    bell: Bell,
) -> None:
    def ask(number: int) -> Asked:
        return Asked(JOBS, {**headers, "Idempotency-Key": f"{number}"}, request_body)

    found, ids = list[Death](), list[str]()
    impatient = settings.model_copy(update={"ring_again_s": 1e-6})
    before = rows(sessions)
    for number, death in enumerate(deaths(ask)):
        found.append(death)
        # whether or not its own bell rang, the sweep rings for a job that is there
        assert sweep.sweep_once(sessions, Bell(), impatient).rung == ["any"] * death.whole, death
        reply = again(http, ask(number))
        assert (reply.status_code, "Idempotent-Replayed" in reply.headers) == (201, death.whole), death
        ids.append(reply.json()["id"])
        assert rows(sessions)["jobs"] - before["jobs"] == number + 1, "one in all"
        with sessions.begin() as s:  # so that the next one waits alone
            jobs.request_cancel(s, ids[-1])

    whole_or_nothing(*found)
    expected = {"jobs": 1, "job_events": 2, "files": 2, "audit_events": 3, "idempotency_keys": 1}
    assert found[0].added == Counter(expected | {"webhook_messages": 1, "webhook_deliveries": len(endpoints)})
    assert [death.rung for death in found] == [int(death.place in (ANSWERED, None)) for death in found]
    assert len(bell.rung) == sum(not death.whole for death in found), "a replay rings no bell"
    assert len(found) > 20, "statements"
    assert len(set(ids)) == len(found)
    with sessions() as s:
        told = "SELECT body::jsonb->'data'->>'id' FROM webhook_messages"
        assert Counter(s.scalars(text(told))) == Counter(ids)
        audited = "SELECT object_id FROM audit_events WHERE action = 'job.created'"
        assert Counter(s.scalars(text(audited))) == Counter(ids)
        events = "SELECT job_id FROM job_events WHERE (seq, type) IN ((1, 'job.created'), (2, 'job.queued'))"
        assert Counter(s.scalars(text(events))) == Counter(ids * 2)
    nothing_else_is_left(sessions, settings)


@pytest.mark.slow
def test_a_deletion_request_is_there_with_all_that_belongs_to_it_or_not_at_all(
    deaths: Callable[..., Iterator[Death]],
    http: TestClient,
    headers: dict[str, str],
    endpoints: list[str],
    settings: Settings,
    sessions: Sessions,
    request_body: dict[str, Any],
) -> None:
    body = {"regulation": "gdpr", "models": ["m"], "forget_set": request_body["forget_set"], "subjects": ["a@b.c"]}

    def ask(number: int) -> Asked:
        return Asked(REQUESTS, {**headers, "Idempotency-Key": f"{number}"}, body)

    with sessions.begin() as s:
        s.execute(update(Tenant).values(approvals=1))
    found, ids = list[Death](), set[str]()
    for number, death in enumerate(deaths(ask)):
        found.append(death)
        reply = again(http, ask(number))
        assert (reply.status_code, "Idempotent-Replayed" in reply.headers) == (201, death.whole), death
        ids.add(reply.json()["id"])
        assert rows(sessions)["deletion_requests"] == len(ids) == number + 1

    whole_or_nothing(*found)
    expected = {"deletion_requests": 1, "files": 1, "audit_events": 3, "idempotency_keys": 1}
    assert found[0].added == Counter(expected | {"webhook_messages": 1, "webhook_deliveries": len(endpoints)})
    nothing_else_is_left(sessions, settings)


@pytest.mark.slow
def test_an_approval_counts_with_all_that_follows_from_it_or_not_at_all(
    deaths: Callable[..., Iterator[Death]],
    http: TestClient,
    endpoints: list[str],
    sessions: Sessions,
    request_body: dict[str, Any],
    make_key: Callable[..., str],
) -> None:
    approver = {"Authorization": f"Bearer {make_key('compliance_approver')}"}
    body = {"regulation": "gdpr", "models": ["m"], "forget_set": request_body["forget_set"]}
    with sessions.begin() as s:
        s.execute(update(Tenant).values(approvals=1))
    waiting = list[str]()

    def ask(_: int) -> Asked:
        waiting.append(http.post(REQUESTS, json=body).json()["id"])
        return Asked(f"{REQUESTS}/{waiting[-1]}/approve", approver)

    found = []
    for death in deaths(ask):
        found.append(death)
        path = f"{REQUESTS}/{waiting[-1]}"
        assert http.get(path).json()["status"] == ("approved" if death.whole else "pending_approval"), death
        again = http.post(f"{path}/approve", headers=approver)  # who was not answered asks again, and counts once
        assert (again.status_code, again.json()["status"], len(again.json()["approvals"])) == (200, "approved", 1)

    whole_or_nothing(*found)
    expected = {"deletion_approvals": 1, "audit_events": 2, "webhook_messages": 1, "webhook_deliveries": len(endpoints)}
    assert found[0].added == Counter(expected)
    assert audit.check(make_sessions(sessions.kw["bind"]), DEFAULT).fault is None


@pytest.mark.usefixtures("endpoints")
def test_a_server_that_is_killed_within_a_transaction_leaves_nothing_of_it(
    http: TestClient,
    headers: dict[str, str],
    settings: Settings,
    sessions: Sessions,
    request_body: dict[str, Any],
    tmp_path: Path,
) -> None:
    """`unlearn api` itself: all is written but for the audit rows, which wait for their turn, when it is killed."""
    port = free_port()
    environment = os.environ | {"DATABASE_URL": settings.database_url, "BROKER_URL": settings.broker_url}
    environment |= {"STORAGE_URL": settings.storage_url, "MASTER_KEY": MASTER_KEY, "API_PORT": str(port)}
    asked = Asked(JOBS, {**headers, "Idempotency-Key": "k"}, request_body)
    url, log = f"http://127.0.0.1:{port}", tmp_path / "api.log"
    with running([sys.executable, "-m", "service.cli", "api"], log, environment) as server:
        until = time.monotonic() + 60
        while not alive(url):
            assert server.poll() is None, tail(log)
            assert time.monotonic() < until, tail(log)
            time.sleep(0.05)
        before = rows(sessions)
        with sessions.begin() as s:
            s.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('audit default', 0))"))
            with FORKS.Pool(1) as pool:
                pending = pool.apply_async(sent, (url, asked))
                while not waits(sessions):
                    assert not pending.ready(), pending.get()
                    assert time.monotonic() < until
                    time.sleep(0.01)
                server.kill()
                assert pending.get(GONE_S) is None, "an answer came"
    assert server.returncode == -signal.SIGKILL
    while waits(sessions):
        time.sleep(0.01)
    assert rows(sessions) == before
    reply = again(http, asked)
    assert (reply.status_code, "Idempotent-Replayed" in reply.headers) == (201, False)
    assert rows(sessions)["jobs"] == before["jobs"] + 1
    nothing_else_is_left(sessions, settings)


def alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez").is_success
    except httpx.TransportError:
        return False


def sent(url: str, asked: Asked) -> int | None:
    """The status; None: the connection broke off."""
    try:
        return httpx.post(f"{url}{asked.path}", headers=asked.headers, json=asked.body, timeout=60).status_code
    except httpx.TransportError:
        return None


def waits(sessions: Sessions) -> bool:
    """Whether somebody stands in line for the audit log."""
    with sessions() as s:
        return bool(s.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")))
