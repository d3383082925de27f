"""HEAD is GET without the body, on every path that has a GET; and what headers answers have, the document says."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from service.api.headers import HEADERS
from service.app import create_app
from service.processes import free_port
from service.settings import Settings
from service.store.session import Sessions
from service.store.storage import Storage
from tests.service.conftest import JOBS, Bell
from tests.service.test_contract import DOCUMENT
from tests.service.test_evidence_routes import issue, succeed

MakeKey = Callable[..., str]
OTHER_EACH_TIME = {"x-request-id", "ratelimit", "date"}
PATHS = json.loads(DOCUMENT.read_text())["paths"]
GETS = sorted(path for path, operations in PATHS.items() if "get" in operations)


@pytest.fixture
def urls(
    http: TestClient, sessions: Sessions, settings: Settings, upload: Callable[..., str], request_body: dict[str, Any]
) -> dict[str, str]:
    """path of the document -> where there is something; of a job, one with evidence."""
    retain = upload("retain_set", [{"text": "Bob lives in Liège."}])
    job = http.post(JOBS, json=request_body).json()["id"]
    succeed(sessions, settings, job)
    assert issue(sessions, settings) == 1
    asked = {"regulation": "gdpr", "models": ["m"], "forget_set": request_body["forget_set"]}
    request = http.post("/v1/deletion-requests", json=asked).json()["id"]
    http.post(f"/v1/deletion-requests/{request}/cancel")  # an open one counts its seconds
    recipe = {"method": {"type": "pdu"}, "constraint": {"epsilon": 1}, "retain_set": retain}
    plan = {"job": recipe, "window_seconds": 0, "requests_max": 1}
    assert http.put("/v1/deletion-plans/m", json=plan).status_code == 200
    sets = dict.fromkeys(("forget", "holdout"), upload("eval_set", [{"text": "Carl"}]))
    benchmark = {"name": "news", "suite": "muse", "corpus": "News", "sets": sets}
    assert http.post("/v1/benchmarks", json=benchmark).status_code == 201
    endpoint = http.post("/v1/webhook-endpoints", json={"url": "https://93.184.215.14/"}).json()["id"]
    ids = {
        "job_id": job,
        "artifact_id": http.get(f"{JOBS}/{job}/artifacts").json()["data"][0]["id"],
        "file_id": retain,
        "request_id": request,
        "model": "m",
        "name": "news",
        "endpoint_id": endpoint,
        "key_id": http.get("/v1/api-keys").json()["data"][0]["id"],
    }
    return {path: path.format(**ids) for path in GETS}


def told(reply: Any, path: str) -> dict[str, str]:
    """The headers, but for those that differ from one request to the next."""
    other = OTHER_EACH_TIME | ({"content-length"} if path == "/metrics" else set())
    return {name: value for name, value in reply.headers.items() if name not in other}


def test_head_is_get_without_the_body(http: TestClient, urls: dict[str, str]) -> None:
    for path, url in {**urls, "/docs": "/docs", "/openapi.json": "/openapi.json"}.items():
        whole, head = http.get(url), http.head(url)
        assert (whole.status_code, head.status_code, head.content) == (200, 200, b""), f"{path}: {whole.text}"
        assert told(head, path) == told(whole, path), path
        assert int(whole.headers.get("content-length", len(whole.content))) == len(whole.content), path


def test_head_hears_the_headers_that_get_hears_and_reads_no_more_than_where_the_body_would_begin(
    http: TestClient, urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = urls[f"{JOBS}/{{job_id}}/artifacts/{{artifact_id}}/content"]
    etag = http.head(content).headers["ETag"]
    assert http.head(content, headers={"If-None-Match": etag}).status_code == 304
    part = http.head(content, headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.headers["Content-Length"], part.content) == (206, "3", b"")
    log = http.head("/v1/audit-events", headers={"Accept": "application/jsonl"})
    assert (log.headers["Content-Type"], log.content) == ("application/jsonl", b"")
    stream = http.head(urls[f"{JOBS}/{{job_id}}/events"], headers={"Accept": "text/event-stream"})
    assert stream.headers["Content-Type"].startswith("text/event-stream")

    read = 0

    def counted(*_: object, **__: object) -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b"x"

    monkeypatch.setattr(Storage, "read", counted)
    assert int(http.head(content).headers["Content-Length"]) > 5
    assert read <= 2, "of an adapter of gigabytes the first chunk, by which it is known to be there, is enough"


def test_head_needs_the_scopes_that_get_needs(http: TestClient, make_key: MakeKey, urls: dict[str, str]) -> None:
    powerless = {"Authorization": f"Bearer {make_key('dashboard')}"}
    forbidden = 0
    for path, url in urls.items():
        for headers in ({"Authorization": ""}, powerless):
            whole, head = http.get(url, headers=headers), http.head(url, headers=headers)
            assert (head.status_code, head.content) == (whole.status_code, b""), path
            assert head.headers.get("WWW-Authenticate") == whole.headers.get("WWW-Authenticate"), path
            forbidden += head.status_code == 403
    assert forbidden > 20


def test_a_path_without_get_has_no_head(http: TestClient) -> None:
    reply = http.head("/v1/deletion-requests/dreq_0/approve")
    assert (reply.status_code, reply.headers["Allow"], reply.content) == (405, "POST", b"")
    assert http.head("/nowhere").status_code == 404
    assert http.get("/metrics").text.count('method="HEAD",route="unmatched"') > 0, "counted as what it is"


def test_on_a_connection_that_stays_the_next_answer_follows_the_head(
    http: TestClient, urls: dict[str, str], settings: Settings, make_key: MakeKey
) -> None:
    """As `curl -I` sends it, through the server: not a byte of a body, which would be read as the next answer."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(settings, dispatcher=Bell()), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    report, content = urls[f"{JOBS}/{{job_id}}/report"], urls[f"{JOBS}/{{job_id}}/artifacts/{{artifact_id}}/content"]
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
            connection.makefile("rb") as reply,
        ):
            for path in (report, content, "/v1/audit-events", "/nowhere", "/livez"):
                head = f"HEAD {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {make_key('admin')}\r\n\r\n"
                connection.sendall(head.encode())
                status = reply.readline().split()
                assert status[:2] == [b"HTTP/1.1", b"404" if path == "/nowhere" else b"200"], path
                while reply.readline() != b"\r\n":
                    pass
    finally:
        server.should_exit = True
        thread.join()


def test_an_answer_has_the_headers_of_the_document_and_no_other_of_them(http: TestClient, urls: dict[str, str]) -> None:
    ours = {name.lower() for name in HEADERS}
    for path, url in urls.items():
        documented = PATHS[path]["get"]["responses"]["200"]["headers"]
        names = {name.lower() for name in documented}
        always = {name.lower() for name in documented if HEADERS[documented[name]["$ref"].rpartition("/")[2]].always}
        sent = set(http.get(url).headers)
        assert always <= sent, path
        assert sent & ours <= names, path
