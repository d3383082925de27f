"""The Python client against the real API on the loopback, over a network that fails on purpose."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from service import terminal
from service.api import stream
from service.cli import app
from service.client import ApiError, Client, Job, Step, wire
from service.client import stream as client_stream
from service.domain.errors import UnlearnError
from service.domain.job import Stage, Verdict
from service.evidence import verify
from service.settings import Settings
from service.store import jobs
from service.store.rows import ConstraintRow, StepRow
from service.store.session import Sessions
from tests.service import test_cli
from tests.service.test_evidence_routes import issue, succeed

url = test_cli.url  # an API on a port of its own, with one model, "m"
MakeKey = Callable[..., str]
FORGET = [{"question": "Who is Ada?", "answer": "A poet."}]
RETAIN = [{"question": "Who is Bob?", "answer": "A baker."}]


class Network(httpx.BaseTransport):
    """The real one, noting what is sent, with failures of ours."""

    def __init__(self) -> None:
        self.wire = httpx.HTTPTransport()
        self.sent: list[httpx.Request] = []
        self.before: list[Exception | httpx.Response | None] = []  # in place of the next requests; None: let it pass
        self.after: list[Exception | None] = []  # in place of the next answers

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        match self.before.pop(0) if self.before else None:
            case Exception() as error:
                raise error
            case httpx.Response() as reply:
                return reply
        reply = self.wire.handle_request(request)
        if self.after and (lost := self.after.pop(0)):
            reply.close()
            raise lost
        return reply

    def close(self) -> None:
        self.wire.close()


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def api(url: str, make_key: MakeKey, network: Network) -> Iterator[Client]:
    with Client(url, make_key("admin"), transport=network) as client:
        yield client


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds for which the client would have slept."""
    seconds: list[float] = []
    monkeypatch.setattr(wire, "sleep", seconds.append)
    monkeypatch.setattr(client_stream, "sleep", seconds.append)
    return seconds


def submitted(api: Client, **fields: Any) -> Job:
    asked: dict[str, Any] = {"model": "m", "forget_set": FORGET, "retain_set": RETAIN, "epsilon": 0.3}
    return api.submit(**asked | fields)


def test_a_job_is_submitted_seen_and_moved(api: Client, tmp_path: Path) -> None:
    array = tmp_path / "retain.json"
    array.write_text(json.dumps(RETAIN * 3))
    job = submitted(api, retain_set=array, budget={"max_steps": 7}, metadata={"ticket": "1"})
    assert (job.status, job.model, job.metadata, job.ended, job.verdict) == (
        "queued",
        "m",
        {"ticket": "1"},
        False,
        None,
    )
    assert job.raw["budget"]["max_steps"] == 7
    assert [(one.purpose, one.rows) for one in api.files.list()] == [("retain_set", 3), ("forget_set", 1)]
    assert api.job(job.id) == job
    paused = api.pause(job.id, version=job.version)
    assert (paused.status, paused.version > job.version) == ("paused", True)
    with pytest.raises(ApiError) as stale:
        api.resume(job.id, version=job.version)
    assert (stale.value.status, stale.value.type) == (412, "/docs#precondition-failed")
    assert api.resume(job.id).status == "queued"
    assert api.checkpoints(job.id) == []
    assert api.cancel(job.id).ended
    with pytest.raises(ApiError) as ended:
        api.retry(job.id)
    assert ended.value.status == 409


def test_a_list_goes_over_all_pages(api: Client, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PAGE", 2)
    forget, retain = api.files.upload("forget_set", FORGET).id, api.files.upload("retain_set", RETAIN).id
    made = [submitted(api, forget_set=forget, retain_set=retain).id for _ in range(5)]
    assert [job.id for job in api.jobs()] == made[::-1]
    api.cancel(made[0])
    assert [job.id for job in api.jobs(status="cancelled")] == made[:1]
    asked = len(network.sent)
    next(api.jobs())
    assert len(network.sent) == asked + 1, "a page that nobody wants is not fetched"


def test_an_error_has_the_services_words_and_leaves_no_file(api: Client) -> None:
    with pytest.raises(ApiError) as refused:
        submitted(api, epsilon=float("nan"), hyperparameters={"lr": 1})
    error = refused.value
    assert (error.status, error.type) == (422, "/docs#validation-error")
    assert error.errors[0].pointer == "/constraint/epsilon"
    assert "  /constraint/epsilon: Input should be a finite number" in str(error)
    assert error.request_id == error.raw["request_id"]
    assert all(file.purged_at for file in api.files.list())
    with pytest.raises(ApiError) as wrong:
        api.files.upload("forget_set", [*FORGET, {"nothing": 1}])
    assert "line 2" in str(wrong.value)
    with pytest.raises(ApiError) as elsewhere:
        api.job(f"{submitted(api).id}?dry_run=true")
    assert elsewhere.value.status == 404, "an id has no query"


def test_what_is_tried_again_happens_once_and_a_long_wait_is_told(
    api: Client, network: Network, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    job = submitted(api)
    body = {name: job.raw[name] for name in ("model", "constraint", "forget_set", "retain_set")}
    body["method"] = {"type": "pdu"}
    failures: list[tuple[list[Exception | httpx.Response | None], list[Exception | None]]] = [
        ([httpx.ConnectError("refused"), httpx.ConnectError("refused")], []),
        ([], [httpx.ReadError("lost"), httpx.RemoteProtocolError("lost")]),  # it was carried out, and nobody was told
        ([httpx.Response(429, headers={"Retry-After": "7"}), httpx.Response(503)], []),
    ]
    for before, after in failures:
        known = len(list(api.jobs()))
        network.before, network.after = before, after
        network.sent.clear()
        api.create_job(body)
        assert len({request.headers["Idempotency-Key"] for request in network.sent}) == 1
        assert (len(network.sent), len(list(api.jobs())) - known) == (3, 1)
    assert slept == [0.3, 0.6, 0.3, 0.6, 7.0, 0.6]
    assert caplog.messages == ["the service answers 429 and asks to wait: again in 7 s"]
    network.after = [httpx.ReadError("lost")]
    made = api.keys.create("auditor", role="auditor")
    assert [key.id for key in api.keys.list() if key.name == "auditor"] == [made.id]
    first = api.create_job(body, idempotency_key="ours")
    assert api.create_job(body, idempotency_key="ours").id == first.id


def test_what_would_happen_twice_or_take_too_long_is_not_tried_again(
    api: Client, network: Network, slept: list[float]
) -> None:
    job = submitted(api)
    network.sent.clear()
    network.after = [httpx.ReadError("lost")]
    with pytest.raises(httpx.ReadError):
        api.pause(job.id)
    assert (len(network.sent), api.job(job.id).status) == (1, "paused"), "carried out, and not sent again"
    network.before = [httpx.Response(429, headers={"Retry-After": "3600"}, json={"title": "Too much"})]
    with pytest.raises(ApiError, match="Too much"):
        next(api.jobs())
    network.before = [httpx.ConnectError("refused")] * 3
    with pytest.raises(httpx.ConnectError):
        next(api.jobs())
    assert slept == [0.3, 0.6]
    network.before = [httpx.Response(200, text="<html>a proxy</html>")]
    with pytest.raises(UnlearnError, match="not with a JSON object"):
        api.job("ujob_1")
    network.before = [httpx.Response(200, json={"id": "ujob_1"})]
    with pytest.raises(UnlearnError, match="a Job that cannot be read: model"):
        api.job("ujob_1")


class Cut(httpx.SyncByteStream):
    """A body that ends in an error after so many bytes."""

    def __init__(self, body: httpx.Response, bytes_: int) -> None:
        self.body, self.bytes = body, bytes_

    def __iter__(self) -> Iterator[bytes]:
        left = self.bytes
        for chunk in self.body.stream:  # type: ignore[union-attr]
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                raise httpx.ReadError("the connection broke")

    def close(self) -> None:
        self.body.close()


def test_events_come_once_and_in_order_over_a_connection_that_breaks(
    api: Client, network: Network, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "POLL_S", 0.02)
    job = api.cancel(submitted(api).id)
    opened, real = [], network.wire.handle_request

    def breaking(request: httpx.Request) -> httpx.Response:
        reply = real(request)
        if request.url.path.endswith("/events"):
            opened.append(request.headers["Last-Event-ID"])
            if reply.status_code == 200:  # somewhere within the first, or the second event
                return httpx.Response(200, stream=Cut(reply, 40 if len(opened) == 1 else 450))
        return reply

    monkeypatch.setattr(network.wire, "handle_request", breaking)
    events = list(api.events(job.id))
    assert [event.seq for event in events] == [1, 2, 3]
    assert [event.type for event in events] == ["job.created", "job.queued", "job.cancelled"]
    assert opened == ["0", "0", "1", "2", "3"]
    assert list(api.events(job.id, after=2)) == events[2:]
    network.before = [httpx.ConnectError("refused")] * 9
    with pytest.raises(httpx.ConnectError):
        list(api.events(job.id))


def test_a_job_is_watched_with_each_step_once(api: Client, sessions: Sessions) -> None:
    job = submitted(api, budget={"max_steps": 9})
    seen: list[list[int]] = []
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    assert claim is not None
    for look, steps in api.watch(job.id, every_s=0):
        seen.append([one.step for one in steps])
        with sessions.begin() as s:
            if len(seen) == 1:
                rows, bound = [step_row(1), step_row(2)], ConstraintRow(0.3, 0.2)
                jobs.log(s, job.id, claim.fence, stage=Stage.UNLEARNING, steps=rows, constraint=bound)
            elif len(seen) == 2:
                assert (look.stage, look.epsilon, steps[0].dual) == ("unlearning", 0.3, {"retain": 50.0})
                jobs.log(s, job.id, claim.fence, steps=[step_row(3)])
            elif len(seen) == 3:
                jobs.succeed(s, job.id, claim.fence, Verdict(result="PASSED", gates=[], message="so it is"))
    assert seen == [[], [1, 2], [3], []]
    assert (look.ended, look.released) == (True, True)


def step_row(number: int) -> StepRow:
    return StepRow(
        step=number,
        losses={"forget": 1.5, "retain": 0.25},
        dual={"retain": 50.0},
        violation={"retain": -0.05},
        learning_rate=1e-3,
        gradient_norm=1.0,
        tokens=10 * number,
        tokens_per_second=10.0,
        elapsed_seconds=float(number),
        extra={},
    )


def test_evidence_is_fetched_whole_and_checked_offline(
    api: Client, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    job = submitted(api)
    succeed(sessions, settings, job.id)
    assert issue(sessions, settings) == 1
    found = api.evidence(job.id, tmp_path / "evidence")
    given = verify.Given(found.certificate, found.adapter, found.report, found.keys, found.audit)
    assert verify.verify(given).exit_status == 0
    assert api.report(job.id) == json.loads(found.report.read_text())
    (tmp_path / "other").mkdir()
    assert api.job(job.id).result.certificate is not None

    with pytest.raises(UnlearnError, match="other bytes than its digest says"):
        api.download(api.artifacts(job.id)[0].model_copy(update={"sha256": "0" * 64}), tmp_path / "other" / "file")
    assert not list((tmp_path / "other").iterdir())


def test_requests_are_submitted_found_and_decided(api: Client, url: str, make_key: MakeKey) -> None:
    when = datetime(2026, 1, 5, 12, tzinfo=UTC)
    asked: dict[str, Any] = {"regulation": "gdpr", "models": ["m"], "forget_set": FORGET}
    one = api.requests.submit(**asked, subjects=["ada@example.org"], external_reference="R-1", received_at=when)
    assert (one.received_at, one.due_at, one.rows, one.external_reference) == (when, when.replace(month=2), 1, "R-1")
    other = api.requests.submit(**asked)
    assert [found.id for found in api.requests.list()] == [other.id, one.id]
    assert [found.id for found in api.requests.list(subject="Ada@example.org")] == [one.id]
    with pytest.raises(ApiError) as unknown:
        api.requests.submit(**asked | {"models": ["n"]})
    assert unknown.value.errors[0].code == "model_not_found"
    assert sum(file.purged_at is None for file in api.files.list()) == 2
    with pytest.raises(ApiError) as stale:
        api.requests.cancel(other.id, version=other.version + 1)
    assert stale.value.status == 412
    assert api.requests.cancel(other.id).status == "cancelled"
    assert api.requests.deny(one.id, "no_match", note="nobody").raw["denial"]["reason"] == "no_match"
    assert api.requests.get(one.id).finished_at is not None

    plan = api.plans.set("m", {"method": {"type": "pdu"}, "constraint": {"epsilon": 1}}, RETAIN, window_seconds=60)
    assert (plan.id, plan.window_seconds, api.plans.get("m")) == ("m", 60, plan)
    api.plans.remove("m")
    made = api.keys.create("reader", role="auditor", expires_at=datetime(2100, 1, 1))
    assert made.secret is not None
    assert made.secret not in repr(made)
    with Client(url, made.secret) as reader, pytest.raises(ApiError) as forbidden:
        reader.files.upload("forget_set", FORGET)
    assert (forbidden.value.status, forbidden.value.raw["required_scopes"]) == (403, ["files:write"])
    api.keys.revoke(made.id)
    with Client(url, made.secret) as reader, pytest.raises(ApiError, match="401"):
        next(reader.jobs())


def test_the_command_line_shows_events_and_a_bar(
    api: Client, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARN_URL", url)
    job = api.cancel(submitted(api).id)
    watched = CliRunner().invoke(app, ["watch", job.id, "--json"])
    assert (watched.exit_code, [json.loads(line)["seq"] for line in watched.stdout.splitlines()]) == (1, [1, 2, 3])
    listed = CliRunner().invoke(app, ["status", "--json"])
    assert json.loads(listed.stdout) == api.job(job.id).raw

    progress = {**job.raw["progress"], "completed": 3, "total": 9}
    running = Job.of(job.raw | {"stage": "unlearning", "epsilon": 0.3, "progress": progress})
    step = Step.of(step_row(3)._asdict())
    monkeypatch.setenv("COLUMNS", "200")
    terminal.bar(iter([(running, [step])]))
    assert "unlearning" in (shown := capsys.readouterr().out)
    assert "3/9 forget 1.5 retain 0.25 (bound 0.3)  violation -0.05  dual/retain 50" in shown
