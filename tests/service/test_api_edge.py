"""What holds for every request: problems, ids, limits, headers, health, metrics, documentation."""

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from starlette.testclient import TestClient

import service
from service.api.errors import KINDS
from service.app import create_app
from service.settings import Settings
from service.store import jobs, workers
from service.store.session import Sessions
from tests.service.conftest import JOBS, Bell, ClientOf

JSON = {"Content-Type": "application/json"}


def kind(reply: Any) -> tuple[int, str]:
    """(status, type); every problem is whole."""
    assert reply.headers["Content-Type"] == "application/problem+json", reply.text
    problem = reply.json()
    assert problem["status"] == reply.status_code
    assert problem["request_id"] == reply.headers["X-Request-ID"]
    assert problem["title"]
    return reply.status_code, problem["type"].removeprefix("/docs#")


def test_every_error_is_a_problem(http: TestClient) -> None:
    assert kind(http.get("/nothing")) == (404, "not-found")
    assert kind(http.get("/v1/files/")) == (404, "not-found")
    assert kind(http.put("/v1/files")) == (405, "method-not-allowed")
    assert kind(http.request("BREW", "/livez")) == (405, "method-not-allowed")
    for broken in (b"{", b"", b"\xff", json.dumps({"model": "m"}).encode("utf-16")):
        assert kind(http.post(JOBS, content=broken, headers=JSON))[0] in (400, 422), broken[:20]
    assert kind(http.post(JOBS, content=b'{"model": }', headers=JSON)) == (400, "malformed-json")
    assert kind(http.post(JOBS, content=b"[]", headers=JSON)) == (422, "validation-error")
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"):
        reply = http.post(JOBS, content=b"{}", headers={"Content-Type": media_type})
        assert kind(reply) == (415, "unsupported-media-type"), media_type
    assert kind(http.post(JOBS, content=b"{}")) == (415, "unsupported-media-type")


def test_deep_nesting_is_no_server_error(http: TestClient, request_body: dict[str, Any]) -> None:
    for depth in (50, 61, 62, 200, 300, 900, 5000, 50_000):  # within three objects
        deep = "[" * depth + "]" * depth
        body = json.dumps(request_body).replace(
            '{"type": "pdu"}', f'{{"type": "pdu", "hyperparameters": {{"x": {deep}}}}}'
        )
        reply = http.post(JOBS, content=body, headers=JSON)
        assert kind(reply) == ((422, "validation-error") if depth <= 61 else (413, "payload-too-large")), depth


def test_a_body_over_the_limit_is_refused_while_it_arrives(settings: Settings, client_of: ClientOf) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(10_000):
            taken += 1000
            yield b" " * 1000

    small = settings.model_copy(update={"body_max_bytes": 5000})
    with client_of(small) as http:
        assert kind(http.post(JOBS, content=b" " * 5001, headers=JSON)) == (413, "payload-too-large")
        assert kind(http.post(JOBS, content=endless(), headers=JSON)) == (413, "payload-too-large")
        # no Content-Type makes room for more than the endpoint reads
        for path, media_type in (
            (JOBS, "multipart/form-data; boundary=b"),
            ("/v1/files", "application/x-www-form-urlencoded"),
        ):
            reply = http.post(path, content=b"x=" + b"y" * 5000, headers={"Content-Type": media_type})
            assert kind(reply) == (413, "payload-too-large"), path
        content = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b" " * 6000
        content += b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\neval_set\r\n--b--\r\n'
        reply = http.post("/v1/files", content=content, headers={"Content-Type": "Multipart/Form-Data; boundary=b"})
        assert (kind(reply)[0], reply.json()["errors"][0]["detail"]) == (422, "the set has no rows")
        lying = {**JSON, "Content-Length": "10"}
        assert kind(http.post(JOBS, content=b" " * 6000, headers=lying)) == (413, "payload-too-large")


def test_a_request_id_is_taken_over_or_replaced(http: TestClient) -> None:
    assert http.get("/livez", headers={"X-Request-ID": "abc-1_Z"}).headers["X-Request-ID"] == "abc-1_Z"
    for wrong in ("", "a b", "x" * 65, "<script>", "é".encode()):
        assert http.get("/livez", headers={"X-Request-ID": wrong}).headers["X-Request-ID"].startswith("req_")


def test_every_answer_carries_the_security_headers(http: TestClient) -> None:
    for reply in (
        http.get("/livez"),
        http.get("/nothing"),
        http.get("/v1/models"),
        http.post(JOBS, content=b"{", headers=JSON),
    ):
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert reply.headers["Cache-Control"] == "private, no-cache"


def test_a_failure_of_ours_tells_nothing_but_its_request_id(
    http: TestClient, monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[dict[str, Any]]]
) -> None:
    words = "secret /etc/x"

    def broken(*_: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr("service.store.models.every", broken)
    reply = http.get("/v1/models", headers={"X-Request-ID": "r1"})
    assert kind(reply) == (500, "internal-error")
    assert "secret" not in reply.text
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    logged = log()
    [failed] = [line for line in logged if line["event"] == "request failed"]
    assert failed["request_id"] == "r1"
    assert "RuntimeError" in failed["exception"]
    assert "secret" not in json.dumps(logged), "the words of an error may quote a row"


def test_without_a_database_the_process_lives_and_is_not_ready(settings: Settings, client_of: ClientOf) -> None:
    gone = settings.model_copy(
        update={"database_url": "postgresql+psycopg://u@/db?host=/nowhere", "metrics_public": True}
    )
    with client_of(gone) as http:
        assert http.get("/livez").json() == {"status": "alive"}
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "unready")
        reply = http.get(JOBS)
        assert (kind(reply), reply.headers["Retry-After"]) == ((503, "service-unavailable"), "5")
        mistyped = {"Authorization": http.headers["Authorization"][:-1]}
        assert http.get(JOBS, headers=mistyped).status_code == 401, "told without the database"
        assert "unlearn_collector_success 0.0" in http.get("/metrics").text


def test_a_database_that_was_not_migrated_is_not_ready(settings: Settings, empty_database_url: str, bell: Bell) -> None:
    empty = settings.model_copy(update={"database_url": empty_database_url})
    with TestClient(create_app(empty, dispatcher=bell), raise_server_exceptions=False) as http:
        ready = http.get("/readyz")
        assert ready.status_code == 503
        assert "unlearn migrate" in ready.json()["checks"]["database"]


def test_with_everything_there_it_is_ready(settings: Settings) -> None:
    with TestClient(create_app(settings)) as http:
        assert http.get("/readyz").json() == {"status": "ready", "checks": {"database": "ok", "broker": "ok"}}


def test_metrics_tell_of_jobs_and_requests_by_closed_labels(
    settings: Settings, sessions: Sessions, new_job: Callable[..., str], client_of: ClientOf
) -> None:
    new_job()
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    assert claim is not None
    job_id = new_job()
    with sessions.begin() as s:
        workers.seen(s, "w1", ["cpu"], 0)
        workers.seen(s, "w2", ["any", "secret-class"], 0)
        workers.seen(s, "w3", ["cpu"], 0)
        s.execute(text("UPDATE workers SET seen_at = now() - interval '1 hour' WHERE name = 'w3'"))
    fresh = settings.model_copy(update={"metrics_cache_s": 0.0})
    with client_of(fresh) as http:
        http.get(f"{JOBS}/{job_id}")
        http.get("/secret/subject-1")
        shown = http.get("/metrics").text
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(shown)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    assert value("unlearn_collector_success") == 1
    assert value("unlearn_jobs", status="running", queue="any") == 1
    assert value("unlearn_jobs", status="queued", queue="any") == 1
    assert value("unlearn_jobs", status="failed", queue="cpu") == 0, "from the start"
    assert value("unlearn_jobs_finished_total", status="failed", method="pdu", failure_code="worker_lost") == 0
    assert value("unlearn_job_verdicts_total", result="PASSED") == 0
    assert value("unlearn_workers", queue="cpu") == 1, "the one that fell silent does not count"
    assert value("unlearn_workers", queue="any") == 2, "every worker hears it"
    assert value("unlearn_leases_expired_total", queue="cpu") == 0
    assert value("unlearn_fenced_writes_total") == 0
    assert value("unlearn_queue_oldest_age_seconds", queue="any") > 0
    assert value("unlearn_running_heartbeat_age_seconds_max", queue="any") > 0
    assert value("unlearn_http_requests_total", method="GET", route=JOBS + "/{job_id}", code="200") == 1
    assert value("unlearn_http_requests_total", method="GET", route="unmatched", code="404") == 1
    assert value("unlearn_http_in_flight_requests") == 1
    assert "secret" not in shown
    assert job_id not in shown
    assert len(samples) < 2000


def test_what_rings_after_the_answer_is_no_part_of_its_figures_and_holds_few_threads(
    http: TestClient, bell: Bell, request_body: dict[str, Any]
) -> None:
    registry = http.app.state.registry  # type: ignore[attr-defined]
    post = {"method": "POST", "route": JOBS}
    ringing, most, in_flight, counted = 0, 0, list[float](), list[float]()
    lock = Lock()

    def ring_slowly() -> None:
        nonlocal ringing, most
        with lock:
            ringing += 1
            most = max(most, ringing)
        time.sleep(0.5)
        in_flight.append(registry.get_sample_value("unlearn_http_in_flight_requests"))
        counted.append(registry.get_sample_value("unlearn_http_request_duration_seconds_count", post))
        with lock:
            ringing -= 1

    bell.on_ring = ring_slowly
    assert http.post(JOBS, json=request_body).status_code == 201
    assert (in_flight, counted) == ([0], [1])
    with ThreadPoolExecutor(6) as pool:
        statuses = list(pool.map(lambda _: http.post(JOBS, json=request_body).status_code, range(6)))
    assert statuses == [201] * 6
    assert (most, len(bell.rung)) == (2, 7)


def test_the_documentation_opens_without_network_and_names_everything(http: TestClient) -> None:
    page = http.get("/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "<p>Needs <code>keys:manage</code></p>" in page.text

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()
            self.links: list[str] = []
            self.ids: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            self.tags.add(tag)
            self.links += [given[name] or "" for name in ("href", "src") if name in given]
            self.ids |= {given["id"] or ""} if "id" in given else set()

    reader = Reader()
    reader.feed(page.text)
    assert not reader.tags & {"script", "link", "img", "iframe"}
    assert all(link.startswith(("#", "/")) for link in reader.links)
    assert {link[1:] for link in reader.links if link.startswith("#")} <= reader.ids
    assert {kind.name for kind in KINDS} <= reader.ids
    for path in http.get("/openapi.json").json()["paths"]:
        assert path in page.text


def test_openapi_declares_the_problems_of_every_operation(http: TestClient) -> None:
    api = http.get("/openapi.json").json()
    assert "HTTPValidationError" not in json.dumps(api)
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], path
            assert "500" in operation["responses"], f"{method} {path}"
            if "{" in path:
                assert "404" in operation["responses"], path
            if "requestBody" in operation:
                assert {"400", "413", "415", "422"} <= set(operation["responses"]), path
            problems = [r for code, r in operation["responses"].items() if code >= "400" and path != "/readyz"]
            assert all(list(r["content"]) == ["application/problem+json"] for r in problems), path
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(api)))
    assert references <= set(api["components"]["schemas"])


# --- characters that are none


def unbounded(schemas: dict[str, Any], schema: dict[str, Any], where: str, seen: set[str]) -> Iterator[str]:
    """Strings of a request that anything may stand in."""
    name = schema.get("$ref", "").rpartition("/")[2]
    if name and name not in seen:
        seen.add(name)
        yield from unbounded(schemas, schemas[name], name, seen)
    bounds = {"maxLength", "pattern", "enum", "format", "const"}
    if schema.get("type") == "string" and not bounds & schema.keys():
        yield where
    inner = [
        *schema.get("anyOf", ()),
        *schema.get("oneOf", ()),
        schema.get("items"),
        schema.get("additionalProperties"),
    ]
    for one in inner:
        if isinstance(one, dict):
            yield from unbounded(schemas, one, where, seen)
    for field, one in schema.get("properties", {}).items():
        yield from unbounded(schemas, one, f"{where}.{field}", seen)


def test_every_string_of_a_request_but_a_rows_texts_is_bounded() -> None:
    """One that is has to be text, too: half a surrogate pair, which no database takes, is refused where it stands."""
    document = json.loads((Path(service.__path__[0]) / "openapi.json").read_text())
    schemas, seen = document["components"]["schemas"], set[str]()
    bodies = [
        content["schema"]
        for operations in document["paths"].values()
        for operation in operations.values()
        for kind, content in operation.get("requestBody", {}).get("content", {}).items()
        if kind == "application/json"
    ]
    found = {where for body in bodies for where in unbounded(schemas, body, "", seen)}
    assert {where.partition(".")[0] for where in found} == {"Row"}


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"lora": {"target_modules": ["\ud800"]}}, "/lora/target_modules/0"),
        ({"method": {"type": "\ud800"}}, "/method/type"),
        ({"metadata": {"\ud800": "v"}}, "/metadata"),
        ({"metadata": {"k": "\ud800"}}, "/metadata/k"),
        ({"external_id": "\ud800"}, "/external_id"),
        ({"forget_set": [{"question": "Who?", "answer": "\ud800"}]}, "/forget_set/0"),
        ({"forget_set": [{"question": "Who?", "answer": "A", "paraphrased_question": "\ud800"}]}, "/forget_set/0"),
        ({"method": {"type": "pdu", "hyperparameters": {"\ud800": 1}}}, "/method/hyperparameters"),
    ],
)
def test_half_a_surrogate_pair_is_refused_where_it_stands(
    http: TestClient, request_body: dict[str, Any], change: dict[str, Any], pointer: str
) -> None:
    content = json.dumps(request_body | change)  # as an escape, which JSON allows
    reply = http.post(JOBS, content=content, headers=JSON)
    assert reply.status_code == 422, reply.text
    assert any(error["pointer"].startswith(pointer) for error in reply.json()["errors"]), reply.json()["errors"]
