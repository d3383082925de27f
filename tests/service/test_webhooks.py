"""Webhooks from what happens to a receiver: a real one on the loopback, which the reference library verifies for."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Network
from typing import Any

import pytest
from sqlalchemy import Engine, text
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.cli import app
from service.domain.job import Failure, FailureCode, Verdict
from service.settings import Settings
from service.store import audit, deletions, jobs, outbox, webhooks
from service.store.secrets import Secrets
from service.store.session import Sessions, make_sessions
from service.webhook_sender import Sender, keep_sending, send_next, sender_of
from service.webhooks.events import EventType, Subject
from tests.service import test_cli

url = test_cli.url  # an API on a port of its own
ENDPOINTS = "/v1/webhook-endpoints"
NewJob = Callable[..., str]
ClientOf = Callable[..., Any]
PASSED = Verdict(result="PASSED", gates=[], message="so it is")
JOB = Subject("ujob_1", "unlearning.job", "queued")


class Receiver(ThreadingHTTPServer):
    """Answers as `answers` says, one by one, then 204; notes what came. `slow_s`: how long it takes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.slow_s = 0.0
        self.at_once = self.at_once_max = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.calls]

    @property
    def told(self) -> list[str]:
        return [body["type"] for body in self.bodies]


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            self.server.calls.append(({name.lower(): value for name, value in self.headers.items()}, body))
            status, headers = self.server.answers.pop(0) if self.server.answers else (204, {})
            self.server.at_once += 1
            self.server.at_once_max = max(self.server.at_once_max, self.server.at_once)
        time.sleep(self.server.slow_s)
        with self.server.lock:
            self.server.at_once -= 1
        self.send_response(status)
        content = b"" if status == 204 else b"what it says"
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def receiving() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


@pytest.fixture
def settings(settings: Settings) -> Settings:
    loopback = [IPv4Network("127.0.0.0/8")]
    return settings.model_copy(update={"webhook_allow_http": True, "webhook_networks": loopback})


@pytest.fixture
def sender(settings: Settings, engine: Engine) -> Sender:
    """As the sweep has it: it sees every tenant."""
    return sender_of(settings, make_sessions(engine))


@pytest.fixture
def secrets(sender: Sender) -> Secrets:
    return sender.secrets


def made(http: TestClient, url: str, **fields: Any) -> dict[str, Any]:
    reply = http.post(ENDPOINTS, json={"url": url, **fields})
    assert reply.status_code == 201, reply.text
    return dict(reply.json())


def send_all(sender: Sender) -> int:
    sent = 0
    while send_next(sender):
        sent += 1
    return sent


def deliveries(http: TestClient, endpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """In the order in which they came."""
    reply = http.get(f"{ENDPOINTS}/{endpoint['id']}/deliveries", params={"order": "asc"})
    assert reply.status_code == 200, reply.text
    return list(reply.json()["data"])


def shown(http: TestClient, endpoint: dict[str, Any]) -> dict[str, Any]:
    return dict(http.get(f"{ENDPOINTS}/{endpoint['id']}").json())


def run(sessions: Sessions, *statements: str) -> None:
    with sessions.begin() as s:
        for statement in statements:
            s.execute(text(statement))


DUE_NOW = "UPDATE webhook_deliveries SET next_at = now() WHERE status = 'pending'"
NO_LEASE = "UPDATE webhook_endpoints SET leased_until = now() - interval '1 s'"


def actions(sessions: Sessions, object_id: str) -> list[str]:
    with sessions() as s:
        return [row.action.partition(".")[2] for row in audit.events(s, object_id=object_id)]


# What is told.


def test_a_jobs_life_is_told_in_order_once_each_and_verified(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions, new_job: NewJob
) -> None:
    endpoint = made(http, receiver.url)
    job_id = new_job()
    retryable = Failure.of(FailureCode.STORAGE_FULL, "no room")
    with sessions.begin() as s:
        first = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert first
        jobs.fail(s, job_id, first.fence, retryable)
    run(sessions, "UPDATE jobs SET not_before = NULL")
    with sessions.begin() as s:
        second = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert second
        assert jobs.succeed(s, job_id, second.fence, PASSED)
    cancelled = new_job()
    with sessions.begin() as s:
        jobs.request_cancel(s, cancelled)
    assert send_all(sender) == 7
    of_job = [body["data"] for body in receiver.bodies if body["data"]["id"] == job_id]
    assert [data["status"] for data in of_job] == ["queued", "running", "queued", "running", "succeeded"]
    life = ["queued", "started", "queued", "started", "succeeded", "queued", "cancelled"]
    assert receiver.told == [f"unlearning.job.{verb}" for verb in life]
    assert len({headers["webhook-id"] for headers, _ in receiver.calls}) == 7
    for headers, body in receiver.calls:
        assert Webhook(endpoint["secret"]).verify(body, headers) == json.loads(body)
    times = [body["timestamp"] for body in receiver.bodies]
    assert times == sorted(times)
    assert send_all(sender) == 0


def test_what_happened_first_is_sent_first_whichever_transaction_began_first(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    made(http, receiver.url)
    with sessions.begin() as waits:
        waits.execute(text("SELECT now()"))
        with sessions.begin() as s:
            outbox.enqueue(s, "default", EventType.JOB_QUEUED, JOB)
        outbox.enqueue(waits, "default", EventType.JOB_STARTED, JOB)
    send_all(sender)
    assert receiver.told == ["unlearning.job.queued", "unlearning.job.started"]


def test_a_body_names_the_object_and_nothing_of_anybody(
    http: TestClient, receiver: Receiver, sender: Sender, request_body: dict[str, Any]
) -> None:
    made(http, receiver.url)
    request_body |= {"external_id": "CASE-7", "metadata": {"subject": "ada@example.org"}}
    created = http.post("/v1/unlearning/jobs", json=request_body)
    assert created.status_code == 201, created.text
    assert send_all(sender) == 1
    [(headers, body)] = receiver.calls
    told = json.loads(body)
    assert told.pop("timestamp").endswith("Z")
    job = {"id": created.json()["id"], "object": "unlearning.job", "status": "queued"}
    assert told == {"type": "unlearning.job.queued", "data": job}
    assert not any(word in body.decode() + str(headers) for word in ("Ada", "ada@", "Ghent", "CASE-7", "poet"))


def test_only_who_asked_for_a_type_is_told_nobody_is_no_row_and_what_is_rolled_back_is_not_told(
    http: TestClient, sessions: Sessions, new_job: NewJob
) -> None:
    new_job()
    deaf = made(http, "http://127.0.0.1:1/", event_types=["deletion_request.received", "certificate.issued"])
    new_job()
    assert deliveries(http, deaf) == []
    with sessions() as s:
        assert s.scalar(text("SELECT count(*) FROM webhook_messages")) == 0
    hears = made(http, "http://127.0.0.1:1/", event_types=["unlearning.job.queued"])
    job_id = new_job()
    assert [one["type"] for one in deliveries(http, hears)] == ["unlearning.job.queued"]
    with sessions() as s:
        webhooks.get(s, hears["id"]).event_types = []
        jobs.request_cancel(s, job_id)
        s.flush()
        assert s.scalar(text("SELECT count(*) FROM webhook_messages")) == 2
        s.rollback()
    assert [one["type"] for one in deliveries(http, hears)] == ["unlearning.job.queued"]


def test_a_deletion_request_is_told_and_that_it_is_overdue_once(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    made(http, receiver.url)
    asked = {
        "regulation": "gdpr",
        "models": ["m"],
        "received_at": datetime.now(UTC).isoformat(),
        "forget_set": [{"question": "Who is Ada?", "answer": "A poet."}],
    }
    created = http.post("/v1/deletion-requests", json=asked)
    assert created.status_code == 201, created.text
    run(sessions, "UPDATE deletion_requests SET due_at = now() - interval '1 day'")
    for _ in range(2):
        with sessions.begin() as s:
            deletions.note_overdue(s)
    send_all(sender)
    assert receiver.told == [f"deletion_request.{verb}" for verb in ("received", "approved", "overdue")]
    assert [body["data"]["status"] for body in receiver.bodies] == ["received", "approved", "approved"]
    assert {body["data"]["id"] for body in receiver.bodies} == {created.json()["id"]}


# When it does not arrive.


def test_a_failure_is_tried_again_by_the_schedule_logged_and_given_up(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    endpoint = made(http, receiver.url)
    http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    receiver.answers = [(500, {})] * 10
    for number, wait_s in enumerate([5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400], start=1):
        assert send_all(sender) == 1, "not before its time"
        [one] = deliveries(http, endpoint)
        assert (one["status"], len(one["attempts"])) == ("pending", number)
        waits_s = (
            datetime.fromisoformat(one["next_at"]) - datetime.fromisoformat(one["attempts"][-1]["at"])
        ).total_seconds()
        assert wait_s <= waits_s <= 1.1 * wait_s
        assert shown(http, endpoint)["failing_since"] == one["attempts"][0]["at"]
        run(sessions, DUE_NOW)
    assert send_all(sender) == 1
    [one] = deliveries(http, endpoint)
    assert (one["status"], one["next_at"], len(one["attempts"])) == ("failed", None, 10)
    last = one["attempts"][-1]
    assert last.keys() == {"number", "at", "status", "latency_ms", "reply", "error"}
    assert (last["number"], last["status"], last["reply"]) == (10, 500, "what it says")
    assert last["error"] == "answered 500"
    assert len({headers["webhook-id"] for headers, _ in receiver.calls}) == 1
    assert len({body for _, body in receiver.calls}) == 1
    run(sessions, DUE_NOW)
    assert send_all(sender) == 0
    with sessions() as s:
        counted = s.execute(text("SELECT labels->>'result', value FROM counters WHERE name LIKE '%webhook%'")).all()
    assert dict(tuple(row) for row in counted) == {"retried": 9, "failed": 1}


def test_a_replay_is_the_same_message_again(http: TestClient, receiver: Receiver, sender: Sender) -> None:
    endpoint = made(http, receiver.url)
    pending = http.post(f"{ENDPOINTS}/{endpoint['id']}/test").json()
    assert http.post(f"/v1/webhook-deliveries/{pending['id']}/replay").status_code == 409
    send_all(sender)
    reply = http.post(f"/v1/webhook-deliveries/{pending['id']}/replay")
    assert reply.status_code == 202
    assert reply.json()["id"] != pending["id"]
    assert (reply.json()["message_id"], reply.json()["status"]) == (pending["message_id"], "pending")
    assert send_all(sender) == 1
    (first, body), (again, body_again) = receiver.calls
    assert first["webhook-id"] == again["webhook-id"] == pending["message_id"]
    assert body == body_again
    assert [one["status"] for one in deliveries(http, endpoint)] == ["delivered", "delivered"]


def test_a_sender_that_vanishes_leads_to_another_attempt_with_the_same_id(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies after the call and before it is noted; and if it had only slept, its word would come too late."""
    endpoint = made(http, receiver.url)
    receiver.answers = [(204, {}), (500, {})]
    http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    turns = []

    def dies(_: Any, turn: outbox.Turn, **sent: Any) -> bool:
        turns.append((turn, sent))
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(outbox, "record", dies)
        with pytest.raises(SystemExit):
            send_next(sender)
    assert send_all(sender) == 0, "somebody may be at work on it"
    run(sessions, NO_LEASE)
    assert send_all(sender) == 1
    first, again = (headers["webhook-id"] for headers, _ in receiver.calls)
    assert first == again
    [(turn, sent)] = turns
    with sender.sessions.begin() as s:
        assert not outbox.record(s, turn, **sent)
    [one] = deliveries(http, endpoint)
    assert (one["status"], [attempt["status"] for attempt in one["attempts"]]) == ("pending", [500])


def test_410_disables_and_what_waits_is_cancelled_until_enabled_and_replayed(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions, new_job: NewJob
) -> None:
    endpoint = made(http, receiver.url)
    new_job()
    new_job()
    receiver.answers = [(410, {})]
    assert send_all(sender) == 1
    told = shown(http, endpoint)
    assert (told["status"], told["status_reason"]) == ("disabled", "it answered 410 Gone")
    assert [one["status"] for one in deliveries(http, endpoint)] == ["failed", "cancelled"]
    new_job()
    assert len(deliveries(http, endpoint)) == 2, "nothing is written for it any more"
    last = deliveries(http, endpoint)[-1]["id"]
    for refused in (f"{ENDPOINTS}/{endpoint['id']}/test", f"/v1/webhook-deliveries/{last}/replay"):
        assert http.post(refused).status_code == 409
    assert http.post(f"{ENDPOINTS}/{endpoint['id']}/enable").json()["status"] == "enabled"
    assert http.post(f"/v1/webhook-deliveries/{last}/replay").status_code == 202
    assert send_all(sender) == 1
    assert len(receiver.calls) == 2
    assert actions(sessions, endpoint["id"]) == ["created", "disabled", "enabled"]


def test_five_days_of_failing_disable_and_one_success_begins_anew(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    endpoint = made(http, receiver.url)
    send_test = f"{ENDPOINTS}/{endpoint['id']}/test"
    since = "UPDATE webhook_endpoints SET failing_since = now() - interval '119 hours'"
    receiver.answers = [(503, {}), (503, {}), (200, {}), (503, {})]
    http.post(send_test)
    send_all(sender)
    run(sessions, since, DUE_NOW)
    send_all(sender)
    assert shown(http, endpoint)["status"] == "enabled"
    run(sessions, DUE_NOW)
    send_all(sender)
    assert shown(http, endpoint)["failing_since"] is None
    http.post(send_test)
    send_all(sender)
    run(sessions, since.replace("119", "120"), DUE_NOW)
    receiver.answers = [(503, {})]
    send_all(sender)
    assert shown(http, endpoint)["status_reason"] == "it has taken nothing for 5 days"
    assert [one["status"] for one in deliveries(http, endpoint)] == ["delivered", "failed"]


def test_retry_after_is_kept_and_a_redirect_not_followed(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    endpoint = made(http, receiver.url)
    receiver.answers = [(429, {"Retry-After": "3600"}), (307, {"Location": "http://169.254.169.254/"})]
    http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    send_all(sender)
    [one] = deliveries(http, endpoint)
    waits_s = datetime.fromisoformat(one["next_at"]) - datetime.fromisoformat(one["attempts"][0]["at"])
    assert 3600 <= waits_s.total_seconds() <= 3960
    run(sessions, DUE_NOW)
    send_all(sender)
    [one] = deliveries(http, endpoint)
    assert one["attempts"][1]["error"] == "answered 307, and is not redirected"


# Who sends.


def test_threads_serve_many_and_a_slow_endpoint_keeps_nobody_waiting(
    http: TestClient, receiver: Receiver, settings: Settings, sessions: Sessions, engine: Engine
) -> None:
    """The slow one has a long queue, which began first; it is called by one thread at a time."""
    stop = threading.Event()
    with receiving() as slow:
        slow.slow_s = 0.2
        for endpoint, count in ((made(http, slow.url), 8), (made(http, receiver.url), 6)):
            for _ in range(count):
                assert http.post(f"{ENDPOINTS}/{endpoint['id']}/test").status_code == 202
        threads = [
            threading.Thread(target=keep_sending, args=(settings, make_sessions(engine), stop)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 5
        while len(receiver.calls) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        slow_then = len(slow.calls)
        stop.set()
        for thread in threads:
            thread.join(5)
        assert len(receiver.calls) == 6
        assert slow_then < 8
        assert slow.at_once_max == 1


def test_endpoints_have_turns_however_long_their_queues(http: TestClient, sender: Sender, sessions: Sessions) -> None:
    first, second = (made(http, "http://127.0.0.1:1/") for _ in range(2))
    for endpoint in (first, first, first, second):
        http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    taken = []
    for _ in range(3):
        with sender.sessions.begin() as s:
            turn = outbox.take(s, 15)
            assert turn is not None
            taken.append(turn.endpoint_id)
        with sender.sessions.begin() as s:
            assert outbox.record(
                s, turn, status=200, latency_ms=1, reply="", error=None, retry_after_s=None, disables=False
            )
    assert taken == [first["id"], second["id"], first["id"]]


def test_no_transaction_is_open_while_it_sends(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    endpoint = made(http, receiver.url)
    http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    receiver.slow_s = 0.3
    thread = threading.Thread(target=send_next, args=(sender,))
    thread.start()
    while not receiver.calls:
        time.sleep(0.005)
    run(sessions, "SET LOCAL lock_timeout = '50ms'", "SELECT 1 FROM webhook_endpoints FOR UPDATE")
    with sessions() as s:
        idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
        assert s.scalar(text(idle)) == 0
    thread.join()


def test_an_endpoint_that_is_deleted_while_it_is_called_is_gone(
    http: TestClient, sender: Sender, sessions: Sessions
) -> None:
    endpoint = made(http, "http://127.0.0.1:1/")
    http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    with sender.sessions.begin() as s:
        turn = outbox.take(s, 15)
    assert turn is not None
    assert http.delete(f"{ENDPOINTS}/{endpoint['id']}").status_code == 204
    with sender.sessions.begin() as s:
        assert not outbox.record(
            s, turn, status=None, latency_ms=1, reply="", error="no", retry_after_s=None, disables=True
        )
    assert http.get(f"{ENDPOINTS}/{endpoint['id']}/deliveries").status_code == 404
    assert actions(sessions, endpoint["id"]) == ["created", "deleted"]


def test_an_endpoint_is_not_deleted_under_a_message_that_is_being_written(
    http: TestClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what the message tells of, a job's move, would fail with it."""
    endpoint = made(http, "http://127.0.0.1:1/")
    gone = threading.Thread(target=lambda: http.delete(f"{ENDPOINTS}/{endpoint['id']}"))
    write = outbox._write

    def slowly(*arguments: Any) -> Any:
        gone.start()
        gone.join(0.2)
        return write(*arguments)

    monkeypatch.setattr(outbox, "_write", slowly)
    with sessions.begin() as s:
        outbox.enqueue(s, "default", EventType.JOB_QUEUED, JOB)
    gone.join(5)
    assert http.get(f"{ENDPOINTS}/{endpoint['id']}").status_code == 404


def test_old_messages_are_forgotten_but_for_those_that_wait(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    endpoint = made(http, receiver.url)
    send_test = f"{ENDPOINTS}/{endpoint['id']}/test"
    old, waits, new = (http.post(send_test).json()["id"] for _ in range(3))
    send_all(sender)
    run(
        sessions,
        f"UPDATE webhook_deliveries SET status = 'pending', next_at = now() WHERE id = '{waits}'",
        "UPDATE webhook_messages SET created_at = now() - interval '31 days' WHERE id NOT IN"
        f" (SELECT message_id FROM webhook_deliveries WHERE id = '{new}')",
    )
    with sender.sessions.begin() as s:
        outbox.forget(s)
    assert [one["id"] for one in deliveries(http, endpoint)] == [waits, new]
    with sessions() as s:
        assert s.scalar(text("SELECT count(*) FROM webhook_attempts")) == 2
    assert old not in (waits, new)


# Secrets.


def test_a_rotated_secret_and_the_one_before_verify_for_a_day(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    endpoint = made(http, receiver.url)
    send_test = f"{ENDPOINTS}/{endpoint['id']}/test"
    reply = http.post(f"{ENDPOINTS}/{endpoint['id']}/rotate-secret")
    assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-store")
    old, new = endpoint["secret"], reply.json()["secret"]
    http.post(send_test)
    send_all(sender)
    headers, body = receiver.calls[-1]
    for secret in (old, new):
        assert Webhook(secret).verify(body, headers)
    run(sessions, "UPDATE webhook_endpoints SET old_secret_until = now() - interval '1 s'")
    http.post(send_test)
    send_all(sender)
    headers, body = receiver.calls[-1]
    assert Webhook(new).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(old).verify(body, headers)
    with sessions() as s:
        assert s.scalar(text("SELECT sealed_old_secret FROM webhook_endpoints")) is None
    assert actions(sessions, endpoint["id"]) == ["created", "secret_rotated"]


def test_a_secret_is_shown_once_and_stored_sealed_for_its_endpoint(
    http: TestClient, sessions: Sessions, secrets: Secrets
) -> None:
    reply = http.post(ENDPOINTS, json={"url": "https://93.184.215.14/x", "description": "ours"})
    assert reply.headers["cache-control"] == "no-store"
    endpoint = reply.json()
    assert reply.headers["location"] == f"{ENDPOINTS}/{endpoint['id']}"
    secret = endpoint.pop("secret")
    assert shown(http, endpoint) == endpoint == http.get(ENDPOINTS).json()["data"][0]
    with sessions() as s:
        row = webhooks.get(s, endpoint["id"])
        assert webhooks.opened(secrets, row.id, [row.sealed_secret]) == [secret]
        stored = s.scalars(text("SELECT webhook_endpoints::text FROM webhook_endpoints")).one()
        logged = s.scalars(text("SELECT string_agg(data::text, ' ') FROM audit_events")).one()
    assert secret.removeprefix("whsec_") not in stored
    assert secret.removeprefix("whsec_") not in logged
    assert "93.184" not in logged, "a path may hold a token"


def test_a_creation_that_is_sent_again_makes_no_second_endpoint_and_there_are_only_so_many(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "ENDPOINTS_MAX", 2)
    asked, key = {"url": "https://93.184.215.14/x"}, {"Idempotency-Key": '"k1"'}
    first, again = (http.post(ENDPOINTS, json=asked, headers=key) for _ in range(2))
    assert (first.json(), again.headers["idempotent-replayed"]) == (again.json(), "true")
    assert again.headers["cache-control"] == "no-store"
    assert len(http.get(ENDPOINTS).json()["data"]) == 1
    for status in (201, 422):
        assert http.post(ENDPOINTS, json=asked).status_code == status


def test_what_cannot_be_signed_is_told_in_the_log_and_does_not_stop_the_others(
    http: TestClient, receiver: Receiver, sender: Sender, sessions: Sessions
) -> None:
    broken, whole = (made(http, receiver.url) for _ in range(2))
    for endpoint in (broken, whole):
        http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    of_whole = f"(SELECT sealed_secret FROM webhook_endpoints WHERE id = '{whole['id']}')"
    run(sessions, f"UPDATE webhook_endpoints SET sealed_secret = {of_whole} WHERE id = '{broken['id']}'")
    assert send_all(sender) == 2
    assert len(receiver.calls) == 1
    [one] = deliveries(http, broken)
    assert "MASTER_KEY" in one["attempts"][0]["error"]


# Who may, and where to.

HOSTILE = [
    "http://93.184.215.14/",
    "https://127.0.0.1/",
    "https://[::1]/",
    "https://169.254.169.254/latest/meta-data/",
    "https://10.0.0.1/",
    "https://2130706433/",
    "https://[::ffff:127.0.0.1]/",
    "https://localhost/",
    "https://user:pass@93.184.215.14/",
    "ftp://93.184.215.14/",
    "not a url",
]


def test_hostile_urls_are_refused_by_name(settings: Settings, client_of: ClientOf) -> None:
    as_shipped = {"webhook_allow_http": False, "webhook_networks": []}
    with client_of(settings.model_copy(update=as_shipped)) as http:
        for url in HOSTILE:
            reply = http.post(ENDPOINTS, json={"url": url})
            assert reply.status_code == 422, url
            assert [error["pointer"] for error in reply.json()["errors"]] == ["/url"], url
        assert http.get(ENDPOINTS).json()["data"] == []


def test_an_address_that_was_allowed_is_judged_again_when_it_is_called(
    http: TestClient, receiver: Receiver, sender: Sender
) -> None:
    endpoint = made(http, receiver.url)
    http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    strict = sender._replace(rules=sender.rules._replace(networks=()))
    assert send_all(strict) == 1
    assert receiver.calls == []
    [one] = deliveries(http, endpoint)
    assert one["attempts"][0]["error"] == "127.0.0.1 does not lead to public addresses only"


def test_another_tenants_endpoint_is_not_there_and_is_not_told(
    http: TestClient, make_key: Callable[..., str], new_job: NewJob, receiver: Receiver, sender: Sender
) -> None:
    endpoint = made(http, receiver.url)
    http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
    send_all(sender)
    [one] = deliveries(http, endpoint)
    other = {"Authorization": f"Bearer {make_key('admin', 'other')}"}
    of_one = f"{ENDPOINTS}/{endpoint['id']}"
    for method, path in (
        ("GET", of_one),
        ("DELETE", of_one),
        ("GET", f"{of_one}/deliveries"),
        *(("POST", f"{of_one}/{verb}") for verb in ("test", "enable", "rotate-secret")),
        ("POST", f"/v1/webhook-deliveries/{one['id']}/replay"),
    ):
        assert http.request(method, path, headers=other).status_code == 404, (method, path)
    assert http.get(ENDPOINTS, headers=other).json()["data"] == []
    theirs = http.post(ENDPOINTS, json={"url": "http://127.0.0.1:1/"}, headers=other).json()
    new_job()
    with sender.sessions.begin() as s:  # as the worker has it: it sees every tenant
        assert jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    with sender.sessions() as s:
        of_theirs = "SELECT count(*) FROM webhook_deliveries WHERE endpoint_id = :id"
        assert s.scalar(text(of_theirs), {"id": theirs["id"]}) == 0
    assert len(deliveries(http, endpoint)) == 3
    auditor = {"Authorization": f"Bearer {make_key('auditor')}"}
    assert http.get(ENDPOINTS, headers=auditor).status_code == 403


# What is measured.


def test_the_outbox_is_measured_by_what_nobody_turns_to(
    settings: Settings, client_of: ClientOf, sender: Sender, sessions: Sessions
) -> None:
    def figures(http: TestClient) -> tuple[float, float]:
        lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
        names = ("unlearn_outbox_pending", "unlearn_outbox_oldest_age_seconds")
        pending, age_s = (float(lines[f'{name}{{kind="webhook"}}']) for name in names)
        return pending, age_s

    with client_of(settings.model_copy(update={"metrics_cache_s": 0.0})) as http:
        assert figures(http) == (0, 0)
        endpoint = made(http, "http://127.0.0.1:1/")
        for _ in range(2):
            http.post(f"{ENDPOINTS}/{endpoint['id']}/test")
        run(sessions, "UPDATE webhook_deliveries SET next_at = now() - interval '600 s'")
        pending, age_s = figures(http)
        assert pending == 2
        assert 600 <= age_s < 660
        with sender.sessions.begin() as s:
            assert outbox.take(s, 15)
        assert figures(http) == (2, 0), "it has its turn"
        run(sessions, "UPDATE webhook_endpoints SET leased_until = now() - interval '300 s'")
        assert 300 <= figures(http)[1] < 360
        run(sessions, "UPDATE webhook_endpoints SET status = 'disabled'")
        assert figures(http) == (0, 0)


def test_the_command_line(url: str, receiver: Receiver, sender: Sender) -> None:
    def cli(*words: str) -> str:
        result = CliRunner().invoke(app, ["webhooks", *words], env={"UNLEARN_URL": url})
        assert result.exit_code == 0, result.output
        return result.output.strip()

    endpoint_id, secret = cli("add", receiver.url, "--event", "certificate.issued").split()
    assert f"{endpoint_id}  enabled  {receiver.url}  certificate.issued" in cli("list")
    delivery_id = cli("test", endpoint_id)
    send_all(sender)
    headers, body = receiver.calls[0]
    assert Webhook(secret).verify(body, headers)
    assert delivery_id in cli("deliveries", endpoint_id)
    assert json.loads(cli("deliveries", endpoint_id, "--json"))[0]["attempts"][0]["status"] == 204
    assert cli("replay", delivery_id).startswith("whdel_")
    assert cli("rotate", endpoint_id).startswith("whsec_")
    cli("enable", endpoint_id)
    cli("remove", endpoint_id)
    assert cli("list") == ""
