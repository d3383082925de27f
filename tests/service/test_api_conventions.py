"""HTTP as its standards have it: a creation that is sent twice, quotas, streams, long polls, dry runs, preconditions."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from service.api import jobs as api_jobs
from service.api import once, stream
from service.app import create_app
from service.domain.job import Failure, FailureCode, Verdict
from service.processes import free_port
from service.settings import Settings
from service.store import idempotency, jobs, keys, models, reads, workers
from service.store.rows import Claim
from service.store.session import Sessions
from service.store.tables import File, IdempotencyKey, Job, Worker
from service.sweep import forget_answers
from tests.service.conftest import JOBS, Bell, ClientOf

Body = dict[str, Any]
IANA = "https://iana.org/assignments/http-problem-types#quota-exceeded"


def count(sessions: Sessions, table: Any) -> int:
    with sessions.begin() as s:
        return s.scalars(select(func.count()).select_from(table)).one()


def type_of(reply: Any) -> tuple[int, str]:
    return reply.status_code, reply.json()["type"].removeprefix("/docs#")


def claim(sessions: Sessions) -> Claim:
    with sessions.begin() as s:
        found = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    assert found is not None
    return found


def failed(sessions: Sessions) -> str:
    """A job that failed for good."""
    job_id, _, fence, *_ = claim(sessions)
    with sessions.begin() as s:
        jobs.fail(s, job_id, fence, Failure.of(FailureCode.NON_FINITE_LOSS, "it blew up"))
    return job_id


@contextmanager
def soon(action: Callable[[], Any], after_s: float = 0.3) -> Iterator[None]:
    timer = threading.Timer(after_s, action)
    timer.start()
    yield
    timer.join()


# --- Idempotency-Key


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ('"8e03978e-40d5-43e8-bc93-6894a57f9324"', "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        ("8e03978e-40d5-43e8-bc93-6894a57f9324", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        (r'"a \"b\" \\"', r'a "b" ' + "\\"),
        ("k" * 255, "k" * 255),
        ("k" * 256, None),
        ('""', None),
        ("", None),
        ("a b", None),
        ('"a', None),
        (r'"a\b"', None),
        ("a, b", None),
        ('"é"', None),
    ],
)
def test_a_key_is_a_structured_string_or_a_bare_token(given: str, key: str | None) -> None:
    assert once.read_key(given) == key


def test_a_creation_that_is_sent_twice_is_carried_out_once(
    http: TestClient, sessions: Sessions, bell: Bell, settings: Settings, request_body: Body
) -> None:
    first = http.post(JOBS, json=request_body, headers={"Idempotency-Key": '"k-1"'})
    stored = sorted(Path(settings.storage_url).rglob("*.sealed"))
    again = http.post(JOBS, json=request_body, headers={"Idempotency-Key": "k-1"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert (first.headers.get("Idempotent-Replayed"), again.headers["Idempotent-Replayed"]) == (None, "true")
    assert again.json() == first.json()
    assert [again.headers[name] for name in ("Location", "ETag")] == [
        first.headers[name] for name in ("Location", "ETag")
    ]
    assert (count(sessions, Job), len(bell.rung)) == (1, 1)
    assert sorted(Path(settings.storage_url).rglob("*.sealed")) == stored
    with sessions.begin() as s:
        row = s.scalars(select(IdempotencyKey)).one()
    assert first.json()["id"] not in json.dumps([row.body, row.fingerprint]), (
        "an answer may hold a secret: it is sealed"
    )


def test_a_key_belongs_to_one_request_of_one_principal(
    http: TestClient, sessions: Sessions, make_key: Callable[..., str], request_body: Body
) -> None:
    key = {"Idempotency-Key": '"k"'}
    assert http.post(JOBS, json=request_body, headers=key).status_code == 201
    assert type_of(http.post(JOBS, json=request_body | {"seed": 7}, headers=key)) == (422, "idempotency-key-reused")
    respelt = json.dumps(dict(reversed(request_body.items())), indent=1)
    reply = http.post(JOBS, content=respelt, headers=key | {"Content-Type": "application/json"})
    assert type_of(reply) == (422, "idempotency-key-reused"), "what is compared is the bytes"
    planned = http.post(JOBS, json=request_body, headers=key, params={"dry_run": True})
    assert (planned.status_code, planned.json()["object"]) == (200, "unlearning.job.plan"), "another route"
    other = {"Authorization": f"Bearer {make_key('mlops')}"}
    assert "Idempotent-Replayed" not in http.post(JOBS, json=request_body, headers=key | other).headers
    assert count(sessions, Job) == 2
    for wrong in ("", "a b", '"' + "k" * 256 + '"'):
        reply = http.post(JOBS, json=request_body, headers={"Idempotency-Key": wrong})
        assert (*type_of(reply), reply.json()["errors"][0]["code"]) == (422, "validation-error", "idempotency_key")


def test_the_answer_outlives_the_files_that_it_was_about(
    http: TestClient, upload: Callable[..., str], request_body: Body
) -> None:
    request_body |= {purpose: upload(purpose, [{"text": purpose}]) for purpose in ("forget_set", "retain_set")}
    first = http.post(JOBS, json=request_body, headers={"Idempotency-Key": "k"}).json()
    http.post(first["links"]["cancel"])
    for purpose in ("forget_set", "retain_set"):
        assert http.delete(f"/v1/files/{request_body[purpose]}").status_code == 204
    again = http.post(JOBS, json=request_body, headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json()) == (201, first), "looked up before it is judged"
    assert type_of(http.post(JOBS, json=request_body, headers={"Idempotency-Key": "l"}))[0] == 422


def test_while_the_first_is_being_answered_the_second_waits_outside(
    http: TestClient, sessions: Sessions, settings: Settings, request_body: Body
) -> None:
    with sessions.begin() as s:
        who = keys.page(s)[0][0].id
        idempotency.begin(s, idempotency.Asked(who, f"POST {JOBS}", "k", "another server's"))
        reply = http.post(JOBS, json=request_body, headers={"Idempotency-Key": "k"})
        assert type_of(reply) == (409, "idempotency-in-flight")
        assert int(reply.headers["Retry-After"]) > 0
    assert (count(sessions, Job), count(sessions, File)) == (0, 0)
    assert not list(Path(settings.storage_url).rglob("*.sealed")), "its inline rows are gone again"
    assert http.post(JOBS, json=request_body, headers={"Idempotency-Key": "k"}).status_code == 201


def test_of_many_at_once_one_creates(http: TestClient, sessions: Sessions, bell: Bell, request_body: Body) -> None:
    def send(_: int) -> Any:
        return http.post(JOBS, json=request_body, headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(send, range(6)))
    codes = {reply.status_code for reply in replies}
    assert 201 in codes
    assert codes <= {201, 409}
    assert len({reply.json()["id"] for reply in replies if reply.status_code == 201}) == 1
    assert (count(sessions, Job), len(bell.rung), count(sessions, File)) == (1, 1, 2)


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("after", [False, True])
def test_the_key_and_the_job_are_there_together_or_not_at_all(
    http: TestClient, sessions: Sessions, request_body: Body, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    keep = idempotency.keep

    def cut(*given: Any) -> None:
        if after:
            keep(*given)
        raise RuntimeError("cut before the commit")

    with monkeypatch.context() as patched:
        patched.setattr(idempotency, "keep", cut)
        assert http.post(JOBS, json=request_body, headers={"Idempotency-Key": "k"}).status_code == 500
    assert (count(sessions, Job), count(sessions, IdempotencyKey)) == (0, 0)
    reply = http.post(JOBS, json=request_body, headers={"Idempotency-Key": "k"})
    assert (reply.status_code, "Idempotent-Replayed" in reply.headers) == (201, False)
    assert (count(sessions, Job), count(sessions, IdempotencyKey)) == (1, 1)


def test_after_a_day_a_key_is_new(http: TestClient, sessions: Sessions, request_body: Body) -> None:
    key = {"Idempotency-Key": "k"}
    first = http.post(JOBS, json=request_body, headers=key).json()
    assert forget_answers(sessions) == 0
    with sessions.begin() as s:
        s.execute(update(IdempotencyKey).values(created_at=func.now() - idempotency.KEPT))
    second = http.post(JOBS, json=request_body, headers=key)
    assert (second.status_code, second.json()["id"] != first["id"]) == (201, True), "though nobody has swept"
    assert http.post(JOBS, json=request_body, headers=key).json() == second.json()
    with sessions.begin() as s:
        s.execute(update(IdempotencyKey).values(created_at=func.now() - idempotency.KEPT))
    assert (forget_answers(sessions), count(sessions, IdempotencyKey)) == (1, 0)


# --- quotas


def test_a_principal_has_a_quota_and_is_told_what_is_left(
    settings: Settings, client_of: ClientOf, make_key: Callable[..., str]
) -> None:
    with client_of(settings.model_copy(update={"rate_limit_per_minute": 3})) as http:
        for left in (2, 1, 0):
            reply = http.get("/v1/models")
            assert reply.status_code == 200
            assert reply.headers["RateLimit-Policy"] == '"default";q=3;w=60'
            assert reply.headers["RateLimit"].startswith(f'"default";r={left};t=')
        reply = http.get("/v1/models")
        problem = reply.json()
        assert (reply.status_code, problem["type"], problem["violated-policies"]) == (429, IANA, ["default"])
        assert 0 < int(reply.headers["RateLimit"].rpartition("t=")[2]) <= int(reply.headers["Retry-After"]) <= 60
        assert reply.headers["RateLimit"].startswith('"default";r=0;')
        other = {"Authorization": f"Bearer {make_key('auditor')}"}
        assert http.get("/v1/models", headers=other).status_code == 200, "each has its own"


def test_cve_2025_57816_no_header_of_the_client_opens_another_quota(settings: Settings, client_of: ClientOf) -> None:
    with client_of(settings.model_copy(update={"rate_limit_per_minute": 2})) as http:
        codes = [
            http.get("/v1/models", headers={name: f"10.0.0.{number}", "X-Request-ID": f"r{number}"}).status_code
            for number, name in enumerate(
                ["X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP", "CF-Connecting-IP"]
            )
        ]
    assert codes == [200, 200, 429, 429, 429]


def test_cve_2025_57815_whoever_guesses_keys_is_stopped(settings: Settings, client_of: ClientOf) -> None:
    with client_of(settings.model_copy(update={"rate_limit_failures_per_minute": 2})) as http:
        guess = {"Authorization": "Bearer ulk_00000000_" + "0" * 43 + "_000000"}
        assert [http.get("/v1/models", headers=guess).status_code for _ in range(4)] == [401, 401, 429, 429]
        reply = http.get("/v1/models", headers=guess)
        assert (reply.status_code, reply.json()["violated-policies"]) == (429, ["failures"])
        assert int(reply.headers["Retry-After"]) > 0
        assert http.get("/v1/models").status_code == 200, "who is known is not kept out by those who share his address"
        assert http.get("/livez").status_code == 200


def test_creating_jobs_has_a_quota_of_its_own(settings: Settings, client_of: ClientOf) -> None:
    with client_of(settings.model_copy(update={"rate_limit_jobs_per_hour": 1}), Bell()) as http:
        policies = http.post(JOBS, json={}).headers["RateLimit-Policy"]
        assert policies == '"default";q=600;w=60, "jobs";q=1;w=3600'
        reply = http.post(JOBS, json={})
        assert (reply.status_code, reply.json()["violated-policies"]) == (429, ["jobs"])
        assert reply.headers["RateLimit"].count(";r=") == 2
        listed = http.get(JOBS)
        assert (listed.status_code, "jobs" in listed.headers["RateLimit-Policy"]) == (200, False)


def test_without_redis_each_process_counts_alone(settings: Settings, client_of: ClientOf) -> None:
    away = {"rate_limit_per_minute": 2, "broker_url": f"redis://127.0.0.1:{free_port()}/0"}
    with client_of(settings.model_copy(update=away), Bell()) as http:
        began = time.monotonic()
        assert [http.get("/v1/models").status_code for _ in range(4)] == [200, 200, 429, 429]
        assert time.monotonic() - began < 3, "it is not asked each time"


def test_two_processes_share_a_quota_and_zero_is_none(settings: Settings, client_of: ClientOf) -> None:
    limited = settings.model_copy(update={"rate_limit_per_minute": 2})
    with client_of(limited) as one, client_of(limited) as other:
        same = {"Authorization": one.headers["Authorization"]}
        assert [http.get("/v1/models", headers=same).status_code for http in (one, other, one)] == [200, 200, 429]
    off = {"rate_limit_per_minute": 0, "rate_limit_jobs_per_hour": 0, "rate_limit_failures_per_minute": 0}
    with client_of(settings.model_copy(update=off)) as http:
        assert "RateLimit" not in http.get("/v1/models").headers
        assert "RateLimit" not in http.post(JOBS, json={}).headers


# --- events as they come


STREAM = {"Accept": "text/event-stream"}


def read(text: str) -> list[dict[str, str]]:
    """The blocks of a stream: field -> value; a comment's field is ""."""
    return [
        {name: value for name, _, value in (line.partition(": ") for line in block.splitlines())}
        for block in text.strip().split("\n\n")
    ]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "POLL_S", 0.03)
    monkeypatch.setattr(api_jobs, "LOOK_EVERY_S", 0.03)


def test_events_are_streamed_until_the_job_has_ended(
    http: TestClient, new_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PING_S", 0.1)
    path = f"{JOBS}/{new_job()}"
    with soon(lambda: http.post(f"{path}/cancel")):
        reply = http.get(f"{path}/events", headers=STREAM)
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    assert (reply.headers["Cache-Control"], reply.headers["X-Accel-Buffering"]) == ("no-store", "no")
    first, *blocks = read(reply.text)
    assert first == {"retry": "3000"}
    assert {"": "ping"} in blocks
    told = [block for block in blocks if "id" in block]
    listed = http.get(f"{path}/events").json()["data"]
    assert [(int(block["id"]), block["event"]) for block in told] == [(one["seq"], one["type"]) for one in listed]
    assert [json.loads(block["data"]) for block in told] == listed
    assert told[-1]["event"] == "job.cancelled"


def test_a_stream_goes_on_where_it_broke_off(http: TestClient, new_job: Callable[..., str]) -> None:
    path = f"{JOBS}/{new_job()}"
    http.post(f"{path}/cancel")
    for headers, query in (
        ({"Last-Event-ID": "2"}, ""),
        ({}, "?after_seq=2"),
        ({"Last-Event-ID": "2"}, "?after_seq=1"),
    ):
        reply = http.get(f"{path}/events{query}", headers=STREAM | headers)
        assert [block["id"] for block in read(reply.text) if "id" in block] == ["3"]
    assert http.get(f"{path}/events", headers=STREAM | {"Last-Event-ID": "3"}).status_code == 204
    assert http.get(f"{path}/events", headers=STREAM | {"Last-Event-ID": "x"}).status_code == 422
    assert http.get(f"{path}/events", headers={"Accept": "image/png"}).status_code == 406
    assert http.get(f"{JOBS}/ujob_0/events", headers=STREAM).status_code == 404


@contextmanager
def served(settings: Settings) -> Iterator[tuple[str, uvicorn.Server]]:
    """On a port, as `unlearn api` serves."""
    app = create_app(settings, dispatcher=Bell())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=10))
    app.state.stopping = lambda: server.should_exit
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(8)
    assert not thread.is_alive()


def test_a_stream_comes_at_once_is_counted_and_holds_nobody_up(
    settings: Settings, make_key: Callable[..., str], new_job: Callable[..., str]
) -> None:
    headers = {"Authorization": f"Bearer {make_key('mlops')}"}
    path = f"{JOBS}/{new_job()}/events"
    one = settings.model_copy(update={"events_streams_per_principal": 1})
    with served(one) as (url, server), httpx.Client(base_url=url, headers=headers) as http:
        with http.stream("GET", path, headers=STREAM) as live:
            lines = live.iter_lines()
            assert next(line for line in lines if line.startswith("event:")) == "event: job.created", "before it ends"
            second = http.get(path, headers=STREAM)
            assert (second.status_code, second.json()["violated-policies"]) == (429, ["streams"])
            assert int(second.headers["Retry-After"]) > 0
        began = time.monotonic()
        while (reply := http.send(http.build_request("GET", path, headers=STREAM), stream=True)).status_code == 429:
            assert time.monotonic() - began < 3, "the client is gone: its place must be free again"
            reply.close()
        lines = reply.iter_lines()
        next(lines)
        began, server.should_exit = time.monotonic(), True
        list(lines)
        assert time.monotonic() - began < 3, "the server stops: the stream ends, to be resumed"


# --- polling


def test_a_poll_may_wait_for_a_change(http: TestClient, new_job: Callable[..., str]) -> None:
    path = f"{JOBS}/{new_job()}"
    etag = http.get(path).headers["ETag"]
    same = http.get(path, headers={"If-None-Match": etag, "Prefer": "wait=1"})
    assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", etag)
    assert same.headers["Preference-Applied"] == "wait=1"
    assert same.elapsed.total_seconds() >= 0.9
    for headers in ({"If-None-Match": etag}, {}):
        with soon(lambda: http.post(f"{path}/{'pause' if headers else 'cancel'}")):  # noqa: B023
            changed = http.get(path, headers=headers | {"Prefer": "respond-async, wait=20"})
        assert (changed.status_code, changed.elapsed.total_seconds() < 5) == (200, True)
        assert changed.json()["status"] == ("paused" if headers else "cancelled")
        assert changed.headers["Preference-Applied"] == "wait=20"
    ended = http.get(path, headers={"If-None-Match": changed.headers["ETag"], "Prefer": "wait=20"})
    assert (ended.status_code, ended.elapsed.total_seconds() < 2) == (304, True), "nothing will change any more"
    assert "Preference-Applied" not in http.get(path).headers
    assert "Preference-Applied" not in http.get(path, headers={"Prefer": "wait=soon"}).headers


def test_what_has_not_changed_is_not_sent_again(http: TestClient, upload: Callable[..., str]) -> None:
    file_id = upload("forget_set", [{"text": "a"}])
    for path in ("/v1/models", "/v1/methods", "/v1/files", f"/v1/files/{file_id}", "/v1/workers", "/v1/api-keys", JOBS):
        first = http.get(path)
        again = http.get(path, headers={"If-None-Match": f'"x", W/{first.headers["ETag"]}'})
        assert (again.status_code, again.content) == (304, b""), path
        assert (again.headers["ETag"], again.headers["Cache-Control"]) == (first.headers["ETag"], "private, no-cache")
        assert http.get(path, headers={"If-None-Match": '"x"'}).status_code == 200
    before = http.get("/v1/files").headers["ETag"]
    upload("retain_set", [{"text": "b"}])
    assert http.get("/v1/files", headers={"If-None-Match": before}).status_code == 200


# --- before and after a run


def test_a_dry_run_tells_what_would_be_and_keeps_nothing(
    http: TestClient, sessions: Sessions, settings: Settings, bell: Bell, upload: Callable[..., str], request_body: Body
) -> None:
    for priority in (9, 5, 1):
        http.post(JOBS, json=request_body | {"priority": priority})
    retain = [{"question": "q", "answer": "é"}, {"text": "b"}]
    request_body["retain_set"] = upload("retain_set", retain)
    before = count(sessions, Job), count(sessions, File), len(list(Path(settings.storage_url).rglob("*.sealed")))
    bell.rung.clear()
    reply = http.post(JOBS, json=request_body, params={"dry_run": True})
    plan = reply.json()
    assert (reply.status_code, plan["object"], "Location" in reply.headers) == (200, "unlearning.job.plan", False)
    sizes = {
        purpose: {
            "rows": len(rows),
            "bytes": sum(len(json.dumps(row, ensure_ascii=False).encode()) + 1 for row in rows),
        }
        for purpose, rows in (("forget_set", request_body["forget_set"]), ("retain_set", retain))
    }
    sizes["retain_set"]["bytes"] = http.get(f"/v1/files/{request_body['retain_set']}").json()["bytes"]
    assert {name: {key: one[key] for key in ("rows", "bytes")} for name, one in plan["sets"].items()} == sizes
    assert plan["method"]["hyperparameters"]["learning_rate"] > 0
    assert (plan["constraint"]["epsilon"], plan["budget"]["max_steps"], plan["jobs_ahead"]) == (0.3, 300, 2)
    assert "no worker" in plan["status_reason"]
    assert [warning["code"] for warning in plan["warnings"]] == ["prompt_ends_in_space"]
    shared = request_body | {"retain_set": request_body["forget_set"]}
    wrong = http.post(JOBS, json=shared, params={"dry_run": True})
    assert (wrong.status_code, wrong.json()["errors"][0]["code"]) == (422, "overlap"), "judged as usual"
    after = count(sessions, Job), count(sessions, File), len(list(Path(settings.storage_url).rglob("*.sealed")))
    assert (after, bell.rung) == (before, [])


def test_a_place_in_the_line_is_that_of_the_claim(sessions: Sessions, new_job: Callable[..., str]) -> None:
    for due_at in ("2027-01-02T00:00:00Z", "2027-01-01T00:00:00Z", None):
        new_job(priority=5, due_at=due_at)
    new_job(priority=6)
    for priority, due_at in (
        (5, None),
        (5, "2027-01-01T12:00:00Z"),
        (5, "2027-01-01T00:00:00Z"),
        (6, None),
        (7, None),
        (6, "2027-01-01T00:00:00Z"),
    ):
        with sessions.begin() as s:
            job = jobs.get(s, new_job(priority=priority, due_at=due_at))
            place = reads.places(s, [job.id])[job.id]
            jobs.request_cancel(s, job.id)
        with sessions.begin() as s:
            assert reads.ahead(s, priority, job.due_at) == place - 1, (priority, due_at)


def test_a_job_that_failed_is_tried_again(http: TestClient, sessions: Sessions, bell: Bell, request_body: Body) -> None:
    http.post(JOBS, json=request_body)
    path = f"{JOBS}/{failed(sessions)}"
    other = http.post(JOBS, json=request_body).json()
    with sessions.begin() as s:
        s.execute(update(Job).where(Job.status == "failed").values(content_failures=3, infra_losses=2))
    bell.rung.clear()
    reply = http.post(f"{path}/retry")
    job = reply.json()
    assert (reply.status_code, job["status"], job["failure"], job["finished_at"]) == (202, "queued", None, None)
    assert (job["progress"]["queue_position"], bell.rung) == (2, ["any"]), "behind those that wait"
    with sessions.begin() as s:
        row = jobs.get(s, job["id"])
        assert (row.content_failures, row.infra_losses, row.step) == (0, 0, 0)
    assert type_of(http.post(f"{path}/retry")) == (409, "invalid-transition")
    http.post(other["links"]["cancel"])
    assert claim(sessions).attempt == 2
    assert type_of(http.post(f"{JOBS}/ujob_0/retry")) == (404, "not-found")


def test_a_job_whose_sets_are_purged_is_not_tried_again(
    http: TestClient, sessions: Sessions, request_body: Body
) -> None:
    job = http.post(JOBS, json=request_body).json()
    failed(sessions)
    assert http.delete(f"/v1/files/{job['forget_set']}").status_code == 204
    reply = http.post(job["links"]["retry"])
    assert type_of(reply) == (409, "invalid-transition")
    assert job["forget_set"] in reply.json()["detail"]


def test_a_job_that_waits_is_paused_and_resumed_in_its_place(
    http: TestClient, sessions: Sessions, bell: Bell, new_job: Callable[..., str]
) -> None:
    first, second = f"{JOBS}/{new_job()}", f"{JOBS}/{new_job()}"
    for _ in range(2):  # twice is once
        reply = http.post(f"{first}/pause")
        assert (reply.status_code, reply.json()["status"], reply.json()["version"]) == (202, "paused", 2)
    assert claim(sessions).job_id in second, "no worker takes it"
    assert type_of(http.post(f"{second}/resume")) == (409, "invalid-transition")
    bell.rung.clear()
    reply = http.post(f"{first}/resume")
    assert (reply.json()["status"], reply.json()["progress"]["queue_position"], bell.rung) == ("queued", 1, ["any"])
    types = [event["type"] for event in http.get(f"{first}/events").json()["data"]]
    assert types == ["job.created", "job.queued", "job.paused", "job.resumed", "job.queued"]
    http.post(f"{first}/pause")
    assert http.post(f"{first}/cancel").json()["status"] == "cancelled"


def test_a_move_may_be_bound_to_the_version_that_was_seen(http: TestClient, new_job: Callable[..., str]) -> None:
    path = f"{JOBS}/{new_job()}"
    etag = http.get(path).headers["ETag"]
    new_job()  # whatever happens to others is no change of it
    assert http.post(f"{path}/pause", headers={"If-Match": etag}).status_code == 202
    for verb in ("pause", "resume", "cancel", "retry"):
        assert type_of(http.post(f"{path}/{verb}", headers={"If-Match": etag})) == (412, "precondition-failed"), verb
        assert type_of(http.post(f"{path}/{verb}", headers={"If-Match": '"x"'})) == (412, "precondition-failed"), verb
    assert http.get(path).json()["status"] == "paused"
    assert http.post(f"{path}/resume", headers={"If-Match": '"7", "2"'}).status_code == 202
    assert http.post(f"{path}/cancel", headers={"If-Match": "*"}).status_code == 202


def test_each_attempt_is_told_with_its_end(http: TestClient, sessions: Sessions, new_job: Callable[..., str]) -> None:
    path = f"{JOBS}/{new_job()}/attempts"
    assert http.get(path).json()["data"] == []
    job_id, _, fence, *_ = claim(sessions)
    with sessions.begin() as s:
        jobs.release(s, job_id, fence)
    job_id, _, fence, *_ = claim(sessions)
    with sessions.begin() as s:
        jobs.fail(s, job_id, fence, Failure.of(FailureCode.OUT_OF_MEMORY, "too big"))
        s.execute(update(Job).values(not_before=None))
    job_id, _, fence, *_ = claim(sessions)
    running = http.get(path).json()["data"][-1]
    assert (running["outcome"], running["ended_at"], running["message"]) == ("running", None, None)
    with sessions.begin() as s:
        jobs.succeed(s, job_id, fence, Verdict(result="PASSED", gates=[], message="well done"))
    told = http.get(path).json()["data"]
    ends = [(one["attempt"], one["worker"], one["outcome"]) for one in told]
    assert ends == [(1, "w", "given_back"), (1, "w", "lost"), (2, "w", "succeeded")]
    assert all(one["started_at"] <= one["ended_at"] for one in told)
    assert "too big" in told[1]["message"]
    assert http.get(f"{JOBS}/ujob_0/attempts").status_code == 404


def test_workers_are_shown_with_what_they_do(http: TestClient, sessions: Sessions, new_job: Callable[..., str]) -> None:
    new_job()
    claim(sessions)
    with sessions.begin() as s:
        workers.seen(s, "w", ["cpu"], 0)
        workers.seen(s, "free", ["cpu", "h100"], 80, 4)
        workers.seen(s, "gone", ["cpu"], 0)
        s.execute(update(Worker).where(Worker.name == "gone").values(seen_at=func.now() - timedelta(minutes=6)))
    fields = ("state", "jobs", "slots", "gpu_classes")
    shown = {one["id"]: tuple(one[name] for name in fields) for one in http.get("/v1/workers").json()["data"]}
    assert shown == {
        "w": ("busy", 1, 1, ["cpu"]),
        "free": ("idle", 0, 4, ["cpu", "h100"]),
        "gone": ("silent", 0, 1, ["cpu"]),
    }


# --- correlation


def test_the_log_names_the_request_and_the_callers_trace(
    http: TestClient, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[dict[str, Any]]]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(models, "every", broken)
    trace = "0af7651916cd43dd8448eb211c80319c"
    for given, named in (
        (f"00-{trace}-b7ad6b7169203331-01", trace),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"ff-{trace}-b7ad6b7169203331-01", None),
        ("nonsense", None),
    ):
        assert http.get("/v1/models", headers={"X-Request-ID": "r-1", "traceparent": given}).status_code == 500
        [failed] = [line for line in log() if line["event"] == "request failed"]
        assert (failed["request_id"], failed.get("trace_id")) == ("r-1", named)
