"""More requests at once than can be served: each is answered soon, and who polls notices nothing."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from anyio.to_thread import current_default_thread_limiter
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from sqlalchemy.pool import QueuePool
from starlette.testclient import TestClient

from service.api import bodies, concurrency
from service.api.concurrency import ConcurrencyLimit
from service.api.stream import follow
from service.domain.job import ModelEntry, PromptFormat
from service.settings import Settings
from service.store import models
from service.store.session import Sessions, make_engine
from tests.conftest import owner
from tests.service.conftest import JOBS
from tests.service.live import Live, served
from tests.service.test_contract import DOCUMENT

AT_ONCE = 200
SOON_S = 10.0  # of a machine that others use too
NO_QUOTAS = {"RATE_LIMIT_PER_MINUTE": "0", "RATE_LIMIT_JOBS_PER_HOUR": "0"}
SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS '
    BEGIN PERFORM pg_advisory_xact_lock(1), pg_sleep(0.25); RETURN NEW; END';
CREATE TRIGGER slow BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION slow();
"""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


async def ask(live: Live, key: str, method: str, path: str, body: Any = None) -> Answer:
    """On a connection of its own, without a client's library: 200 of those would wait for each other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    began = time.monotonic()
    writer.write(head.encode() + content)
    answer = await reader.read()
    writer.close()
    told, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = told.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(status.split()[1]), headers, content, time.monotonic() - began)


@pytest.fixture
def key(sessions: Sessions, make_key: Callable[..., str]) -> str:
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
    return make_key("admin")


@pytest.fixture
def slow_database(sessions: Sessions) -> None:
    """Which takes one submission at a time, and four in a second."""
    with owner(sessions).begin() as connection:
        connection.execute(text(SLOW))


@pytest.mark.usefixtures("slow_database")
def test_two_hundred_submissions_to_a_slow_database_are_served_or_refused_soon(
    settings: Settings, sessions: Sessions, key: str, request_body: dict[str, Any], tmp_path: Path
) -> None:
    polls = list[tuple[str, Answer]]()

    async def poll(live: Live, job: str, until: asyncio.Event) -> None:
        while not until.is_set():
            for path in ("/livez", "/readyz", "/metrics", job, f"{JOBS}?limit=1"):
                polls.append((path, await ask(live, key, "GET", path)))

    async def storm(live: Live) -> list[Answer]:
        job = (await ask(live, key, "POST", JOBS, request_body)).headers["location"]
        over = asyncio.Event()
        polling = asyncio.create_task(poll(live, job, over))
        answers = await asyncio.gather(*(ask(live, key, "POST", JOBS, request_body) for _ in range(AT_ONCE)))
        over.set()
        await polling
        return answers

    with served(settings, tmp_path, **NO_QUOTAS) as live:
        answers = asyncio.run(storm(live))
    with sessions.begin() as s:
        kept = s.scalar(text("SELECT count(*) FROM jobs"))
    for status in sorted({answer.status for answer in answers}):
        took = [answer.seconds for answer in answers if answer.status == status]
        print(f"{status}: {len(took)}, {min(took):.2f} to {max(took):.2f} s")
    for path in sorted({path for path, _ in polls}):
        took = [answer.seconds for at, answer in polls if at == path]
        print(path, {answer.status for at, answer in polls if at == path}, len(took), f"max {max(took):.2f} s")
    served_ones = [answer for answer in answers if answer.status == 201]
    assert len(served_ones) >= 8
    assert kept == len(served_ones) + 1, "what was refused was not carried out"
    for answer in answers:
        assert answer.seconds < SOON_S
        if answer.status != 201:
            assert (answer.status, answer.headers["retry-after"]) == (503, "2")
            assert json.loads(answer.body)["type"] == "/docs#overloaded"
    assert {answer.status for _, answer in polls} == {200}
    assert max(answer.seconds for _, answer in polls) < SOON_S / 2


def test_what_runs_at_once_leaves_connections_and_threads_to_health_metrics_and_quotas() -> None:
    pool = make_engine("postgresql+psycopg://u@h/d").pool
    assert isinstance(pool, QueuePool)
    running = sum(limit.running for work, limit in concurrency.limits().items() if work != "large_bodies")
    assert running <= pool.size() + pool._max_overflow - 5
    assert running <= asyncio.run(default_threads()) / 2


async def default_threads() -> float:
    return current_default_thread_limiter().total_tokens


@pytest.mark.parametrize("full", ["reads", "writes", "judgements", "transfers"])
def test_work_of_one_kind_keeps_no_other_from_being_done(
    http: TestClient, new_job: Callable[..., str], request_body: dict[str, Any], full: str
) -> None:
    job = f"{JOBS}/{new_job()}"
    http.app.state.concurrency[full] = ConcurrencyLimit(running=1, waiting=0, wait_s=1)  # type: ignore[attr-defined]
    row = {"file": ("f.jsonl", b'{"text": "a"}')}
    answers = {
        "reads": [http.get(JOBS), http.get(job), http.get("/v1/models")],
        "writes": [
            *(http.post(f"{job}/{verb}") for verb in ("pause", "resume", "cancel")),
            *(http.post(f"/v1/deletion-requests/dr_x/{verb}", json={}) for verb in ("approve", "deny", "cancel")),
            http.delete("/v1/api-keys/key_x"),
        ],
        "judgements": [
            http.post(JOBS, json=request_body),
            http.post(JOBS, json=request_body, params={"dry_run": True}),
            http.post(f"{job}/reverify", json={}),
            http.post("/v1/deletion-requests", json={}),
            http.post("/v1/deletion-requests/batch", json={}),
            http.put("/v1/deletion-plans/m", json={}),
            http.post("/v1/benchmarks", json={}),
            http.delete("/v1/benchmarks/b"),
            http.delete("/v1/files/file_x"),
        ],
        "transfers": [http.post("/v1/files", data={"purpose": "forget_set"}, files=row), http.get(f"{job}/report")],
    }
    for kind, found in answers.items():
        refused = [answer.status_code == 503 and answer.json()["type"] == "/docs#overloaded" for answer in found]
        assert refused == [kind == full] * len(found), kind
        assert all(answer.status_code < 500 for answer in found) or kind == full
    assert {http.get(path).status_code for path in ("/livez", "/readyz", "/metrics")} == {200}


def test_full_limits_and_refusals_are_metrics(http: TestClient, new_job: Callable[..., str]) -> None:
    new_job()

    def exported() -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if "work" in sample.labels]
        return {f"{sample.name} {sample.labels['work']}": sample.value for sample in samples}

    before = exported()
    assert {value for name, value in before.items() if not name.startswith("unlearn_http_slots ")} == {0}
    assert before["unlearn_http_slots reads"] == 6
    limit: ConcurrencyLimit = http.app.state.concurrency["reads"]  # type: ignore[attr-defined]
    limit.waiting, limit.wait_s = 1, 0.05
    with ExitStack() as held:
        for _ in range(limit.running):
            held.enter_context(http.portal.wrap_async_context_manager(limit.slot()))  # type: ignore[union-attr]
        waiting = http.portal.start_task_soon(limit._slots.acquire)  # type: ignore[union-attr]
        while limit.waiting_now < 1:
            time.sleep(0.01)
        assert http.get(JOBS).status_code == 503, "the queue is full"
        after = exported()
        waiting.cancel()
        assert http.get(JOBS).status_code == 503, "waited too long"
    changed = {name: value for name, value in after.items() if value != before[name]}
    assert changed == {
        "unlearn_http_slots_used reads": 6,
        "unlearn_http_waiting_requests reads": 1,
        "unlearn_http_refused_requests_total reads": 1,
    }
    assert exported() == before | {"unlearn_http_refused_requests_total reads": 2}


def test_of_large_bodies_few_are_received_at_once_and_the_others_refused_unread(
    settings: Settings, key: str, request_body: dict[str, Any], tmp_path: Path
) -> None:
    content = json.dumps(request_body).encode()
    content += b" " * (bodies.SMALL_BYTES + 1 - len(content))
    head = f"POST {JOBS}?dry_run=true HTTP/1.1\r\nHost: h\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
    announced = f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    running, refused = 32, 8

    async def send_half(live: Live) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
        writer.write(announced + content[:1000])
        return reader, writer

    async def status(reader: asyncio.StreamReader) -> int:
        return int((await asyncio.wait_for(reader.readline(), SOON_S)).split()[1])

    async def storm(live: Live) -> None:
        sent = [await send_half(live) for _ in range(running + refused)]
        early = [asyncio.create_task(status(reader)) for reader, _ in sent]
        while sum(task.done() for task in early) < refused:
            await asyncio.sleep(0.1)
        assert {task.result() for task in early if task.done()} == {503}
        assert (await ask(live, key, "POST", f"{JOBS}?dry_run=true", request_body)).status == 200
        for task, (_, writer) in zip(early, sent, strict=True):
            if not task.done():
                writer.write(content[1000:])
                assert await task == 200
        for _, writer in sent:
            writer.close()

    with served(settings, tmp_path, **NO_QUOTAS) as live:
        asyncio.run(asyncio.wait_for(storm(live), 4 * SOON_S))


def test_a_body_is_large_by_its_length_or_without_one_and_an_upload_never(
    http: TestClient, request_body: dict[str, Any]
) -> None:
    http.app.state.concurrency["large_bodies"] = ConcurrencyLimit(running=1, waiting=0, wait_s=1)  # type: ignore[attr-defined]
    content, json_type = json.dumps(request_body).encode(), {"Content-Type": "application/json"}
    row = {"file": ("f.jsonl", json.dumps({"text": "a" * bodies.SMALL_BYTES}).encode())}
    large = content + b" " * (bodies.SMALL_BYTES + 1 - len(content))
    answers = [
        http.post(JOBS, content=content, headers=json_type),
        http.post(JOBS, content=large, headers=json_type),
        http.post(JOBS, content=iter([content]), headers=json_type),
        http.post("/v1/files", data={"purpose": "forget_set"}, files=row),
    ]
    assert [answer.status_code for answer in answers] == [201, 503, 503, 201]
    assert answers[1].json()["type"] == "/docs#overloaded"


def test_routes_with_a_limit_of_their_own_exist() -> None:
    paths = json.loads(DOCUMENT.read_text())["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert routes >= concurrency.TRANSFERS | concurrency.JUDGEMENTS


class Counted(ConcurrencyLimit):
    taken = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        self.taken += 1
        async with super().slot():
            yield


def test_an_open_stream_of_events_takes_no_slot_of_the_reads(http: TestClient, new_job: Callable[..., str]) -> None:
    job = f"{JOBS}/{new_job()}"
    assert http.post(f"{job}/cancel").status_code == 202
    reads, streams = Counted(6, 100, 1), Counted(2, 100, 1)
    http.app.state.concurrency |= {"reads": reads, "streams": streams}  # type: ignore[attr-defined]
    stream = http.get(f"{job}/events", headers={"Accept": "text/event-stream"})
    assert "job.created" in stream.text
    assert (reads.taken, streams.taken) == (1, 1), "of the reads: to open it"


def test_a_stream_of_events_outlasts_an_overload(
    http: TestClient, sessions: Sessions, new_job: Callable[..., str]
) -> None:
    parts = http.app.state.parts._replace(sessions=sessions)  # type: ignore[attr-defined]
    job_id = new_job()

    async def through_an_overload() -> bytes:
        limit = ConcurrencyLimit(running=1, waiting=0, wait_s=1)  # which refuses all
        stream = follow(parts, job_id, 0, limit, lambda: False)
        assert b"retry" in await anext(stream)
        event = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.2)
        assert not event.done()
        limit.waiting = 1
        return await asyncio.wait_for(event, 10)

    assert b"job.created" in asyncio.run(through_an_overload())


@pytest.mark.slow
def test_who_cannot_be_recognised_soon_is_refused_soon(
    settings: Settings, sessions: Sessions, key: str, tmp_path: Path
) -> None:
    """The first look that hangs is given up after 5 s; those that wait for its connection do not wait as long."""

    async def storm(live: Live) -> list[Answer]:
        return await asyncio.gather(*(ask(live, key, "GET", f"{JOBS}?limit=1") for _ in range(30)))

    with served(settings, tmp_path, **NO_QUOTAS) as live, owner(sessions).begin() as connection:
        connection.execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
        answers = asyncio.run(storm(live))
    assert {(answer.status, answer.headers["retry-after"]) for answer in answers} == {(503, "5")}
    assert sorted(answer.seconds for answer in answers)[24] < 5
    assert max(answer.seconds for answer in answers) < SOON_S
