"""Reports and artifacts over HTTP."""

import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from service.api import reports
from service.api.reports import REPORT_CSP
from service.domain.job import Failure, FailureCode, Verdict
from service.settings import Settings
from service.store import jobs
from service.store.rows import ArtifactRow
from service.store.session import Sessions
from service.store.storage import Storage
from tests.service.conftest import JOBS

CONTENTS = {
    "report.json": (b'{"schema_version": "1"}', "application/json"),
    "report.html": (b"<!doctype html><script>alert(1)</script>", "text/html; charset=utf-8"),
    "adapter/adapter_model.safetensors": (bytes(range(256)) * 8192, "application/octet-stream"),  # two chunks
}


@pytest.fixture
def done(
    http: TestClient, settings: Settings, sessions: Sessions, new_job: Callable[..., str]
) -> dict[str, dict[str, Any]]:
    """The artifacts of a succeeded job by name."""
    job_id = new_job()
    storage = Storage(settings.storage_url)
    rows = []
    for name, (content, media_type) in CONTENTS.items():
        key = f"jobs/{job_id}/attempts/1/{name}"
        rows.append(ArtifactRow(name, key, media_type, *storage.write(key, [content])))
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        jobs.succeed(s, job_id, claim.fence, Verdict(result="PASSED", gates=[], message="ok"), rows)
    listed = http.get(f"{JOBS}/{job_id}/artifacts").json()
    return {artifact["name"]: artifact for artifact in listed["data"]}


def test_all_chunks_but_the_first_are_read_in_threads_of_the_downloads(
    http: TestClient, done: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, borrowed = Storage.read, list[float]()

    def noted(self: Storage, *given: Any, **named: Any) -> Iterator[bytes]:
        for chunk in read(self, *given, **named):
            borrowed.append(reports.DOWNLOAD_THREADS.borrowed_tokens)
            yield chunk

    monkeypatch.setattr(Storage, "read", noted)
    part = http.get(done["adapter/adapter_model.safetensors"]["content"], headers={"Range": "bytes=0-2000000"})
    assert len(part.content) == 2_000_001
    assert borrowed == [0, 1]
    assert reports.DOWNLOAD_THREADS.borrowed_tokens == 0


def test_the_report_comes_as_json_or_as_html_that_can_do_nothing(
    http: TestClient, done: dict[str, dict[str, Any]]
) -> None:
    url = f"{JOBS}/{done['report.json']['job_id']}/report"
    for accept in ("application/json", "*/*", "application/*, text/html;q=0.5", ""):
        reply = http.get(url, headers={"Accept": accept})
        assert (reply.status_code, reply.content) == (200, CONTENTS["report.json"][0]), accept
        assert reply.headers["Content-Type"] == "application/json"
    for accept in ("text/html", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"):
        reply = http.get(url, headers={"Accept": accept})
        assert (reply.status_code, reply.content) == (200, CONTENTS["report.html"][0]), accept
        assert reply.headers["Content-Security-Policy"] == REPORT_CSP
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Vary"] == "Accept"
        assert "script-src" not in REPORT_CSP
    assert http.get(url, headers={"Accept": "application/pdf"}).status_code == 406


def test_a_report_that_the_client_has_is_not_sent_again(http: TestClient, done: dict[str, dict[str, Any]]) -> None:
    url = f"{JOBS}/{done['report.json']['job_id']}/report"
    tags = {accept: http.get(url, headers={"Accept": accept}).headers["ETag"] for accept in ("*/*", "text/html")}
    for accept, tag in tags.items():
        again = http.get(url, headers={"Accept": accept, "If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert (again.headers["ETag"], again.headers["Vary"]) == (tag, "Accept")
    other_form = http.get(url, headers={"Accept": "text/html", "If-None-Match": tags["*/*"]})
    assert (other_form.status_code, other_form.content) == (200, CONTENTS["report.html"][0])


def test_a_report_is_not_ready_before_the_end_and_missing_after_a_failure(
    http: TestClient, sessions: Sessions, new_job: Callable[..., str]
) -> None:
    job_id = new_job()
    early = http.get(f"{JOBS}/{job_id}/report")
    assert (early.status_code, early.json()["type"]) == (409, "/docs#not-ready")
    assert http.get(f"{JOBS}/{job_id}/artifacts").json()["data"] == []
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        jobs.fail(s, job_id, claim.fence, Failure.of(FailureCode.ROW_TOO_LONG, "row 7"))
    late = http.get(f"{JOBS}/{job_id}/report")
    assert (late.status_code, late.json()["type"]) == (404, "/docs#not-found")


def test_an_artifact_is_downloaded_whole_in_parts_or_not_again(
    http: TestClient, done: dict[str, dict[str, Any]]
) -> None:
    content, media_type = CONTENTS["adapter/adapter_model.safetensors"]
    artifact = done["adapter/adapter_model.safetensors"]
    sha256 = hashlib.sha256(content)
    assert (artifact["bytes"], artifact["sha256"]) == (len(content), sha256.hexdigest())

    whole = http.get(artifact["content"])
    assert (whole.status_code, whole.content) == (200, content)
    digest = f"sha-256=:{b64encode(sha256.digest()).decode()}:"
    expected = {
        "ETag": f'"{sha256.hexdigest()}"',
        "Content-Length": str(len(content)),
        "Content-Type": media_type,
        "Content-Disposition": 'attachment; filename="adapter_model.safetensors"',
        "Content-Digest": digest,
        "Repr-Digest": digest,
    }
    assert {name: whole.headers[name] for name in expected} == expected

    for asked, part in (
        ("0-9", slice(0, 10)),
        ("5-", slice(5, None)),
        ("-7", slice(-7, None)),
        ("0-99999999", slice(0, None)),
    ):
        reply = http.get(artifact["content"], headers={"Range": f"bytes={asked}"})
        assert (reply.status_code, reply.content) == (206, content[part]), asked
        assert int(reply.headers["Content-Length"]) == len(content[part])
        assert reply.headers["Content-Range"].endswith(f"/{len(content)}")
        assert "Content-Digest" not in reply.headers
    for ignored in ("bytes=9-3", "bytes=0-1,5-6", "lines=1-2", "bytes=-"):
        assert http.get(artifact["content"], headers={"Range": ignored}).status_code == 200, ignored
    stale = http.get(artifact["content"], headers={"Range": "bytes=0-1", "If-Range": '"other"'})
    assert stale.status_code == 200
    outside = http.get(artifact["content"], headers={"Range": f"bytes={len(content)}-"})
    assert (outside.status_code, outside.headers["Content-Range"]) == (416, f"bytes */{len(content)}")
    assert http.get(artifact["content"], headers={"If-None-Match": expected["ETag"]}).status_code == 304


def test_an_artifact_belongs_to_its_job_and_its_bytes_may_be_gone(
    http: TestClient, settings: Settings, done: dict[str, dict[str, Any]], new_job: Callable[..., str]
) -> None:
    artifact = done["report.html"]
    other = new_job()
    assert http.get(f"{JOBS}/{other}/artifacts/{artifact['id']}/content").status_code == 404
    Storage(settings.storage_url).delete(f"jobs/{artifact['job_id']}")
    gone = http.get(artifact["content"])
    assert (gone.status_code, gone.headers["Content-Type"]) == (404, "application/problem+json")


@pytest.mark.parametrize("place", [0, -1])
def test_bytes_that_are_not_those_of_the_digest_are_never_sent_as_the_whole(
    place: int, http: TestClient, settings: Settings, done: dict[str, dict[str, Any]]
) -> None:
    for name, (content, _) in CONTENTS.items():
        damaged = bytearray(content)
        damaged[place] ^= 1
        (path,) = Path(settings.storage_url).rglob(PurePosixPath(name).name)
        path.write_bytes(damaged)
    for name in ("report.json", "report.html"):
        small = http.get(done[name]["content"])
        assert (small.status_code, small.json()["detail"]) == (503, "a stored file is not what was written"), name
    assert http.get(f"{JOBS}/{done['report.json']['job_id']}/report").status_code == 503
    large = http.get(done["adapter/adapter_model.safetensors"]["content"])
    assert len(large.content) < int(large.headers["Content-Length"]), "the answer breaks off"
    assert large.headers["Content-Length"] == str(len(CONTENTS["adapter/adapter_model.safetensors"][0]))


def test_the_schema_of_the_report_is_published_and_sound(http: TestClient) -> None:
    reply = http.get("/v1/schemas/report")
    assert reply.headers["Content-Type"] == "application/schema+json"
    jsonschema.Draft202012Validator.check_schema(reply.json())
    assert {"verdict", "constraint", "figures", "stop"} <= set(reply.json()["required"])


def test_methods_and_models_can_be_asked_for(http: TestClient) -> None:
    methods = {method["id"]: method for method in http.get("/v1/methods").json()["data"]}
    assert methods["pdu"]["parameters"]["properties"]["learning_rate"]["default"] > 0
    assert methods["pdu"]["reference"]
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["prompt_format"]["type"]) == ("m", "model", "plain")
    assert "location" not in model
