"""The service keeps its OpenAPI document: schemathesis sends it what the document allows, and what it does not allow.

Over a socket, as clients do. All of schemathesis' checks are on, and links between operations are followed: what one answer
names is asked for next. The seed is fixed, so a find is found again.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import httpx
import pytest
import schemathesis
import uvicorn
from pydantic_core.core_schema import ErrorType
from schemathesis.config import SchemathesisConfig
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from starlette.testclient import TestClient

from service import openapi
from service.api.examples import EXAMPLES, FILE, MODEL, REQUEST, RETAIN
from service.api.shapes import REQUESTS_PATH
from service.app import create_app
from service.domain.deletion import RequestStatus
from service.domain.job import ModelEntry, PromptFormat
from service.processes import free_port
from service.settings import Settings
from service.store import deletions, models
from service.store.session import Sessions
from tests.service.conftest import Bell

DOCUMENT = Path(openapi.__file__).with_name("openapi.json")
UNLIMITED = dict.fromkeys(
    (
        "rate_limit_per_minute",
        "rate_limit_jobs_per_hour",
        "rate_limit_failures_per_minute",
        "events_streams_per_principal",
    ),
    0,
)
# What a schema says; a request that keeps to it is not refused for one of these. The last two are codes of ours, too: a
# name that is not in the catalogue, a field that another one calls for.
OF_THE_SCHEMA = set(get_args(ErrorType)) - {"value_error", "enum", "missing"}
CHECKS = {
    # What a schema cannot say is refused nevertheless: names of what is not there, two fields that contradict each other
    # (422, see the check below), a version that is not the present one (412).
    "positive_data_acceptance": {"expected-statuses": ["2xx", "3xx", "401", "403", "404", "409", "412", "422"]},
}


OWN = set[str]()  # ids of the keys that ask

# The answer to a creation that is sent again with its Idempotency-Key is the first one, though the endpoint that it names
# may be deleted since: that such an endpoint is gone is no fault.
DELETED_SINCE = {
    "include-path-regex": "^/v1/webhook-endpoints/",
    "checks": {"ensure_resource_availability": {"enabled": False}},
}


class Served(NamedTuple):
    url: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


class Found(NamedTuple):
    requests: int
    statuses: Counter[int]
    failures: dict[tuple[str, str], str]  # (check, operation) -> the first that failed


@pytest.fixture
def served(settings: Settings, sessions: Sessions, make_key: Callable[..., str]) -> Iterator[Served]:
    """The API behind a socket, without limits; who asks is the administrator."""
    with sessions.begin() as s:
        models.add(s, ModelEntry(name=MODEL, source="path", location="m", prompt_format=PromptFormat()))
    app, port = create_app(settings.model_copy(update=UNLIMITED), dispatcher=Bell()), free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(f"http://127.0.0.1:{port}", make_key("admin"))
    server.should_exit = True
    thread.join()


@schemathesis.check
def refused_for_more_than_its_schema(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """A request that the document allows is refused, if at all, for something that no schema can say."""
    if response.status_code == 422 and case.meta is not None and case.meta.generation.mode.is_positive:
        codes = {error["code"] for error in response.json().get("errors", [])}
        assert not codes & OF_THE_SCHEMA, response.text


@schemathesis.hook
def before_call(context: Any, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Who revokes the key that it asks with hears 401 from then on, which tells nothing."""
    if case.method == "DELETE" and not OWN.isdisjoint(map(str, case.path_parameters.values())):
        case.path_parameters["key_id"] = "key_0"


def asked(served: Served, examples: int, *, derived: bool) -> Found:
    """What schemathesis finds with so many random requests for each operation, and with those that it derives from bounds."""
    config = {
        "seed": 2027,
        "headers": served.headers,
        "checks": CHECKS,
        "operations": [DELETED_SINCE],
        "phases": {"coverage": {"enabled": derived}},
        "generation": {"max-examples": examples, "no-shrink": True, "database": "none"},
    }
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", config=SchemathesisConfig.from_dict(config))
    OWN.add(httpx.get(f"{served.url}/v1/api-keys", headers=served.headers, trust_env=False).json()["data"][0]["id"])
    requests, statuses, failures = 0, Counter[int](), dict[tuple[str, str], str]()
    for event in schemathesis.engine.from_schema(schema).execute():
        assert not isinstance(event, FatalError | NonFatalError), event
        if isinstance(event, ScenarioFinished):
            recorder = event.recorder
            requests += len(recorder.interactions)
            statuses.update(one.response.status_code for one in recorder.interactions.values() if one.response)
            for case_id, checked in recorder.checks.items():
                for check in checked:
                    if check.failure_info is not None:
                        where = check.name, recorder.cases[case_id].value.operation.label
                        told = f"{check.failure_info.failure}\n{check.failure_info.code_sample}"
                        failures.setdefault(where, told)
    assert httpx.get(f"{served.url}/v1/models", headers=served.headers, trust_env=False).status_code == 200, "revoked"
    return Found(requests, statuses, failures)


def test_what_the_document_says_is_kept(served: Served) -> None:
    found = asked(served, examples=4, derived=False)
    assert not found.failures, told(found)
    assert found.requests >= 300
    assert {200, 201, 404, 409, 422} <= found.statuses.keys()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_the_document_says_is_kept_ten_thousand_times(served: Served) -> None:
    found = asked(served, examples=150, derived=True)
    assert not found.failures, told(found)
    assert found.requests >= 10_000


def test_a_method_that_a_path_does_not_have_is_answered_with_those_that_it_has(http: TestClient) -> None:
    for path, operations in json.loads(DOCUMENT.read_text())["paths"].items():
        reply = http.request("TRACE", path)
        assert reply.status_code == 405, path
        methods = {*operations} | ({"head"} if "get" in operations else set())
        assert reply.headers["Allow"] == ", ".join(sorted(methods)).upper(), path


def test_every_example_works_when_pasted(http: TestClient, sessions: Sessions, upload: Callable[..., str]) -> None:
    """As it stands, but for ids: of a file that is there, and of a request in a status that the operation is for."""
    with sessions.begin() as s:
        models.add(s, ModelEntry(name=MODEL, source="path", location="m", prompt_format=PromptFormat()))
    files = {"retain_set": upload("retain_set", [RETAIN]), "sets": upload("eval_set", [{"text": RETAIN["answer"]}])}
    pasted = 0
    for path, operations in json.loads(DOCUMENT.read_text())["paths"].items():
        for method, operation in operations.items():
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                ids = {"request_id": of_request(http, sessions, path), "model": MODEL}
                body = with_ids(content["example"], files)
                given: dict[str, Any] = {"json": body}
                if media_type == "multipart/form-data":
                    given = {"data": {"purpose": body["purpose"]}, "files": {"file": ("rows.jsonl", body["file"])}}
                reply = http.request(method, path.format(**ids), **given)
                assert reply.is_success, f"{method} {path}: {reply.text}"
                assert str(reply.status_code) in operation["responses"]
                if "results" in reply.json():  # of a batch
                    assert [one["status"] for one in reply.json()["results"]] == [201]
                pasted += 1
    assert pasted == len(EXAMPLES)


def of_request(http: TestClient, sessions: Sessions, path: str) -> str:
    """A new request's id; for what is asked of one whose jobs failed, such a one's."""
    made = str(http.post(REQUESTS_PATH, json=REQUEST).json()["id"])
    if path.endswith("/close"):
        with sessions.begin() as s:
            deletions.move(s, deletions.locked(s, made), RequestStatus.FAILED)
    return made


def with_ids(example: Any, files: dict[str, str], under: str = "") -> Any:
    match example:
        case dict():
            return {name: with_ids(one, files, name if name in files else under) for name, one in example.items()}
        case str() if example == FILE:
            return files[under]
    return example


def test_the_committed_document_is_the_present_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert openapi.main(["--check", str(DOCUMENT)]) == 0, capsys.readouterr().err
    stale = tmp_path / "openapi.json"
    stale.write_text(DOCUMENT.read_text().replace('"Ask a model to forget"', '"Ask a model"'))
    assert openapi.main(["--check", str(stale)]) == 1
    told = capsys.readouterr().err
    assert "make openapi" in told
    assert '+    "summary": "Ask a model to forget"' in told


def told(found: Found) -> str:
    return "\n\n".join(f"{check}: {operation}\n{words}" for (check, operation), words in found.failures.items())
