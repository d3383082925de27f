"""The Python client has a method for every operation of the API; a new one cannot be forgotten."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Artifact, Client, HubSet
from service.client.sets import Given
from service.domain.errors import UnlearnError
from tests.service.test_client import FORGET, RETAIN, MakeKey, Network, submitted
from tests.service.test_client import url as url
from tests.service.test_contract import DOCUMENT

DREQ, JOBS, HOOKS = "/v1/deletion-requests", "/v1/unlearning/jobs", "/v1/webhook-endpoints"
Call = Callable[[Client, Path], Any]
ASKED: dict[str, Any] = {"regulation": "gdpr", "models": ["m"], "forget_set": "x"}
CONTENT = Artifact.of({"id": "x", "job_id": "x", "name": "a", "media_type": "text/plain", "bytes": 1, "sha256": "0"})


def made_and_removed(api: Client) -> None:
    """The client looks first which files go along."""
    sets: dict[str, Given | HubSet] = {name: [{"text": "t"}] for name in ("forget", "holdout")}
    api.benchmarks.add("x", suite="muse", corpus="c", sets=sets)
    api.benchmarks.remove("x")


CALLS: Mapping[str, Call] = {  # operation -> a call that sends it, of what is called "x"
    "GET /.well-known/unlearning-keys": lambda api, out: api.published_keys(out),
    "GET /v1/api-keys": lambda api, _: [*api.keys.list()],
    "POST /v1/api-keys": lambda api, _: api.keys.create("k", role="auditor"),
    "GET /v1/api-keys/{key_id}": lambda api, _: api.keys.get("x"),
    "DELETE /v1/api-keys/{key_id}": lambda api, _: api.keys.revoke("x"),
    "GET /v1/audit-events": lambda api, _: [*api.audit.events()],
    "GET /v1/audit-events/head": lambda api, _: api.audit.head(),
    "GET /v1/benchmarks": lambda api, _: [*api.benchmarks.list()],
    "POST /v1/benchmarks": lambda api, _: api.benchmarks.add("x", suite="muse", corpus="c", sets={"forget": "x"}),
    "GET /v1/benchmarks/{name}": lambda api, _: api.benchmarks.get("x"),
    "DELETE /v1/benchmarks/{name}": lambda api, _: made_and_removed(api),
    "GET /v1/deletion-plans/{model}": lambda api, _: api.plans.get("x"),
    "PUT /v1/deletion-plans/{model}": lambda api, _: api.plans.set("x", {}, "x"),
    "DELETE /v1/deletion-plans/{model}": lambda api, _: api.plans.remove("x"),
    f"GET {DREQ}": lambda api, _: [*api.requests.list()],
    f"POST {DREQ}": lambda api, _: api.requests.submit(**ASKED),
    f"POST {DREQ}/batch": lambda api, _: api.requests.submit_batch([ASKED]),
    f"POST {DREQ}/search": lambda api, _: [*api.requests.list(subject="x")],
    f"GET {DREQ}/{{request_id}}": lambda api, _: api.requests.get("x"),
    f"GET {DREQ}/{{request_id}}/rows": lambda api, _: [*api.requests.rows("x")],
    f"POST {DREQ}/{{request_id}}/approve": lambda api, _: api.requests.approve("x"),
    f"POST {DREQ}/{{request_id}}/cancel": lambda api, _: api.requests.cancel("x"),
    f"POST {DREQ}/{{request_id}}/close": lambda api, _: api.requests.close("x", "because"),
    f"POST {DREQ}/{{request_id}}/deny": lambda api, _: api.requests.deny("x", "no_match"),
    f"POST {DREQ}/{{request_id}}/extend": lambda api, _: api.requests.extend("x", "because"),
    f"POST {DREQ}/{{request_id}}/requeue": lambda api, _: api.requests.requeue("x"),
    "GET /v1/files": lambda api, _: [*api.files.list()],
    "POST /v1/files": lambda api, _: api.files.upload("forget_set", FORGET),
    "GET /v1/files/{file_id}": lambda api, _: api.files.get("x"),
    "DELETE /v1/files/{file_id}": lambda api, _: api.files.purge("x"),
    "GET /v1/methods": lambda api, _: api.deployment.methods(),
    "GET /v1/models": lambda api, _: api.deployment.models(),
    "GET /v1/schemas/report": lambda api, _: api.deployment.report_schema(),
    "GET /v1/suites": lambda api, _: [*api.benchmarks.suites()],
    "GET /v1/workers": lambda api, _: api.deployment.workers(),
    f"GET {JOBS}": lambda api, _: [*api.jobs()],
    f"POST {JOBS}": lambda api, _: api.create_job({}),
    f"GET {JOBS}/{{job_id}}": lambda api, _: api.job("x"),
    f"GET {JOBS}/{{job_id}}/artifacts": lambda api, _: api.artifacts("x"),
    f"GET {JOBS}/{{job_id}}/artifacts/{{artifact_id}}/content": lambda api, out: api.download(CONTENT, out),
    f"GET {JOBS}/{{job_id}}/attempts": lambda api, _: api.attempts("x"),
    f"POST {JOBS}/{{job_id}}/cancel": lambda api, _: api.cancel("x"),
    f"GET {JOBS}/{{job_id}}/certificate": lambda api, out: api.certificate("x", out),
    f"GET {JOBS}/{{job_id}}/checkpoints": lambda api, _: api.checkpoints("x"),
    f"GET {JOBS}/{{job_id}}/events": lambda api, _: [*api.events("x")],
    f"POST {JOBS}/{{job_id}}/pause": lambda api, _: api.pause("x"),
    f"GET {JOBS}/{{job_id}}/report": lambda api, _: api.report("x"),
    f"POST {JOBS}/{{job_id}}/resume": lambda api, _: api.resume("x"),
    f"POST {JOBS}/{{job_id}}/retry": lambda api, _: api.retry("x"),
    f"POST {JOBS}/{{job_id}}/reverify": lambda api, _: api.reverify("x"),
    f"GET {JOBS}/{{job_id}}/steps": lambda api, _: api.steps("x"),
    f"GET {JOBS}/{{job_id}}/test-result": lambda api, out: api.test_result("x", out),
    "POST /v1/webhook-deliveries/{delivery_id}/replay": lambda api, _: api.webhooks.replay("x"),
    f"GET {HOOKS}": lambda api, _: [*api.webhooks.list()],
    f"POST {HOOKS}": lambda api, _: api.webhooks.add("https://93.184.215.14/"),
    f"GET {HOOKS}/{{endpoint_id}}": lambda api, _: api.webhooks.get("x"),
    f"DELETE {HOOKS}/{{endpoint_id}}": lambda api, _: api.webhooks.remove("x"),
    f"GET {HOOKS}/{{endpoint_id}}/deliveries": lambda api, _: [*api.webhooks.deliveries("x")],
    f"POST {HOOKS}/{{endpoint_id}}/enable": lambda api, _: api.webhooks.enable("x"),
    f"POST {HOOKS}/{{endpoint_id}}/rotate-secret": lambda api, _: api.webhooks.rotate("x"),
    f"POST {HOOKS}/{{endpoint_id}}/test": lambda api, _: api.webhooks.test("x"),
}
NOT_FOR_PROGRAMS = {
    "GET /livez": "of the orchestrator, which asks without a client",
    "GET /readyz": "of the load balancer",
    "GET /metrics": "of Prometheus, in its own format",
}


def operations() -> Iterator[str]:
    for path, found in json.loads(DOCUMENT.read_text())["paths"].items():
        yield from (f"{method.upper()} {path}" for method in found)


def test_every_operation_has_a_method(url: str, make_key: MakeKey, tmp_path: Path) -> None:
    assert set(operations()) == {*CALLS, *NOT_FOR_PROGRAMS}
    network = Network()
    with Client(url, make_key("admin"), transport=network) as api:
        for operation, call in CALLS.items():
            network.sent.clear()
            with suppress(UnlearnError):  # for the most part there is nothing that is called "x"
                call(api, tmp_path / "out")
            method, path = operation.split(" ")
            wanted = "/".join("x" if part.startswith("{") else part for part in path.split("/"))
            sent = [(one.method, one.url.path) for one in network.sent]
            assert (method, wanted) in sent, f"{operation}: {sent}"


@pytest.fixture
def api(url: str, make_key: MakeKey) -> Iterator[Client]:
    with Client(url, make_key("admin")) as client:
        yield client


def test_what_a_deployment_has_and_what_it_noted_is_read(api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one.id for one in api.deployment.models()] == ["m"]
    assert "pdu" in {one.id for one in api.deployment.methods()}
    assert api.deployment.workers() == []
    assert api.deployment.report_schema()["title"] == "Report"
    job = submitted(api)
    assert api.attempts(job.id) == []
    monkeypatch.setattr("service.client.deployment.AUDIT_PAGE", 2)
    noted = [*api.audit.events()]
    assert [one.seq for one in noted] == [*range(1, len(noted) + 1)]
    assert len(noted) > 2
    assert {one.object_id for one in api.audit.events(object_id=job.id)} == {job.id}
    assert [one.seq for one in api.audit.events(after_seq=noted[0].seq)] == [one.seq for one in noted[1:]]
    assert (api.audit.head().seq, api.audit.head().hash) == (noted[-1].seq, noted[-1].hash)


def test_a_batch_says_of_each_what_became_of_it(api: Client) -> None:
    body = {"regulation": "gdpr", "models": ["m"], "forget_set": FORGET}
    made, refused = api.requests.submit_batch([body, body | {"models": ["n"]}], idempotency_key="k")
    assert (made.status, made.index, refused.status, refused.index, refused.request) == (201, 0, 422, 1, None)
    assert made.request is not None
    assert refused.problem is not None
    assert refused.problem["errors"][0]["code"] == "model_not_found"
    again, _ = api.requests.submit_batch([body, body], idempotency_key="k")
    assert again.request is not None
    assert again.request.id == made.request.id


def test_what_makes_something_is_tried_again_and_makes_one(
    url: str, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer got lost: without the key that goes with it, the second try would make another."""
    monkeypatch.setattr("service.client.wire.sleep", lambda _: None)
    network = Network()
    with Client(url, make_key("admin"), transport=network) as api:
        network.after = [httpx.RemoteProtocolError("gone")]
        key = api.keys.create("k", role="auditor", expires_at=datetime(2100, 1, 1, tzinfo=UTC))
        network.after = [httpx.ReadError("gone")]
        file = api.files.upload("retain_set", RETAIN)
        assert [one.id for one in api.files.list()] == [file.id]
        assert [one.id for one in api.keys.list()].count(key.id) == 1
        assert len([one for one in api.keys.list() if one.name == "k"]) == 1
        assert api.keys.get(key.id).name == "k"
        network.after = [httpx.ReadError("gone")]
        sets = dict.fromkeys(("forget", "holdout"), api.files.upload("eval_set", [{"text": "t"}]).id)
        network.after = [httpx.ReadError("gone")]
        assert api.benchmarks.add("news", suite="muse", corpus="c", sets=sets).id == "news"
