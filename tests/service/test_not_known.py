"""A job whose rows the model does not know: what it ends with, what it proves, and what follows it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.api.deps import Parts
from service.batches import serve_deletions
from service.cli import app
from service.domain.job import JobSpec
from service.domain.report import AdapterFile, Parent, Report
from service.evidence import dsse
from service.settings import Settings
from service.store import jobs
from service.store.rows import ArtifactRow
from service.store.session import Sessions
from service.store.storage import Storage
from service.store.tables import Artifact, Model
from tests.service import deleting
from tests.service.deleting import ADA, BOB, EVE, JOBS, Desk, job_body, problem, show
from tests.service.test_evidence_routes import issue, succeed, url
from tests.worker import reports
from worker.assignment import assignment

Submit = Callable[..., dict[str, Any]]
Serve = Callable[..., str]
Ends = Callable[..., str]

parts = deleting.parts
submit = deleting.submit
worker = deleting.worker
over_http = url


@pytest.fixture
def serve(http: TestClient, submit: Submit) -> Serve:
    """serve(row, **fields of the job) -> the job for a new request of that row."""

    def ask(row: dict[str, str], *others: dict[str, str], **fields: Any) -> str:
        reply = http.post(JOBS, json=job_body([row, *others], [submit(row)["id"]], **fields))
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    return ask


@pytest.fixture
def ends(sessions: Sessions, settings: Settings) -> Ends:
    """ends(report) -> the id of the next job, which ended with that report and nothing else."""

    def end(made: Report) -> str:
        with sessions.begin() as s:
            claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
            assert claim is not None
            key, content = (
                f"jobs/{claim.job_id}/attempts/1/report.json",
                made.model_copy(update={"job_id": claim.job_id}),
            )
            stored = Storage(settings.storage_url).write(key, [content.model_dump_json().encode()])
            artifact = ArtifactRow("report.json", key, "application/json", *stored)
            assert jobs.succeed(s, claim.job_id, claim.fence, made.verdict, [artifact])
        return claim.job_id

    return end


def forgotten_by(parent: str, files: Sequence[AdapterFile] = ()) -> Report:
    """With the adapter that a `Desk` publishes, or with these files."""
    named = deleting.ADAPTER
    own = [AdapterFile(name=named.name, bytes=named.bytes, sha256=named.sha256)]
    start = Parent(job_id=parent, files=list(files) or own, forgotten=[])
    return reports.untrained(reports.knowledge("base", 0.3), reports.knowledge("start", 0.1), parent=start)


def payload(reply: Any) -> Any:
    assert reply.status_code == 200, reply.text
    return json.loads(dsse.from_json(reply.content).payload)


def test_the_request_is_completed_with_that_as_the_reason(
    http: TestClient, submit: Submit, ends: Ends, over_http: str
) -> None:
    request = submit(ADA)
    assert http.post(JOBS, json=job_body([ADA], [request["id"]])).status_code == 201
    job_id = ends(reports.untrained())
    job = http.get(f"{JOBS}/{job_id}").json()
    assert (job["status"], job["verdict"]["result"], job["verdict"]["rules"]) == ("succeeded", "NOT_KNOWN", 2)
    assert (job["result"]["adapter"], job["result"]["report"] is not None) == (None, True)
    ended = show(http, request)
    assert ended["status"] == "completed"
    assert (
        ended["status_reason"] == f"job {job_id} on model 'm': the model does not know the rows, so nothing was trained"
    )
    watched = CliRunner().invoke(app, ["watch", job_id, "--url", over_http])
    assert watched.exit_code == 0, watched.output
    assert "NOT_KNOWN: The base model does not know the rows" in watched.stdout
    listed = http.get("/metrics").text
    assert 'unlearn_job_verdicts_total{result="NOT_KNOWN"} 1.0' in listed


def test_the_metric_is_there_before_the_first(http: TestClient) -> None:
    """Else its increase would be invisible to rate()."""
    assert 'unlearn_job_verdicts_total{result="NOT_KNOWN"} 0.0' in http.get("/metrics").text


def test_the_certificate_is_about_the_base_models_files(
    http: TestClient,
    serve: Serve,
    ends: Ends,
    over_http: str,
    sessions: Sessions,
    settings: Settings,
    tmp_path: Path,
) -> None:
    serve(ADA)
    job_id = ends(reports.untrained())
    assert issue(sessions, settings) == 1
    said = payload(http.get(f"{JOBS}/{job_id}/certificate"))
    assert said["predicateType"] == "urn:unlearning-service:unlearning:v2"
    assert [subject["name"] for subject in said["subject"]] == sorted(reports.MODEL)
    assert (said["predicate"]["verdict"]["result"], said["predicate"]["verdict"]["rules"]) == ("NOT_KNOWN", 2)
    told = payload(http.get(f"{JOBS}/{job_id}/test-result"))
    assert (told["predicate"]["result"], told["subject"]) == ("WARNED", said["subject"])

    fetched = CliRunner().invoke(app, ["evidence", job_id, "--out", str(tmp_path / "there"), "--url", over_http])
    assert fetched.exit_code == 0, fetched.output
    command = fetched.stdout.split()
    assert "--adapter" not in command
    for name, content in reports.MODEL.items():
        (tmp_path / name).write_bytes(content)
    verified = CliRunner().invoke(app, [*command[1:], "--model", str(tmp_path)])
    assert verified.exit_code == 0, verified.output
    assert "verdict NOT_KNOWN, by rules 2" in verified.stdout
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    verified = CliRunner().invoke(app, [*command[1:], "--model", str(tmp_path)])
    assert verified.exit_code == 1
    assert "base model file model.safetensors" in verified.stdout


@pytest.mark.parametrize("wrong", ["files", "registered"])
def test_files_that_are_not_those_of_the_model_are_not_certified(
    wrong: str, http: TestClient, serve: Serve, ends: Ends, sessions: Sessions, settings: Settings
) -> None:
    made = reports.untrained()
    if wrong == "files":
        made.base_model.files["model.safetensors"] = 64 * "0"
    else:
        with sessions.begin() as s:
            s.scalars(select(Model)).one().digest = "sha256:" + 64 * "0"
    serve(ADA)
    job_id = ends(made)
    assert issue(sessions, settings) == 0
    assert "are not those of its digest" in http.get(f"{JOBS}/{job_id}/certificate").json()["detail"]


def test_it_is_no_parent_and_the_next_job_starts_from_the_adapter_before_it(
    http: TestClient, submit: Submit, serve: Serve, worker: Desk, ends: Ends
) -> None:
    serve(ADA)
    first = worker.end()
    serve(EVE, parent=first)
    not_known = ends(reports.untrained())
    third = {"text": "third"}
    refused = http.post(JOBS, json=job_body([third], [submit(third)["id"]], parent=not_known))
    [wrong] = problem(refused, 422, "validation-error")["errors"]
    assert wrong["pointer"] == "/parent"
    assert wrong["detail"] == (
        f"job {not_known} released no adapter: the model did not know its rows; start from job {first}, as it did"
    )
    serve(third, parent=first)
    last = worker.end()
    assert http.get(f"{JOBS}/{last}").json()["parent"] == first


def test_rows_that_the_model_never_knew_are_not_forgotten_anew(
    http: TestClient, submit: Submit, serve: Serve, worker: Desk, ends: Ends
) -> None:
    serve(ADA)
    ends(reports.untrained())
    serve(EVE)
    first = worker.end()
    third = {"text": "third"}
    [wrong] = problem(http.post(JOBS, json=job_body([third], [submit(third)["id"]])), 422, "validation-error")["errors"]
    assert (wrong["code"], first in wrong["detail"]) == ("fork", True)
    serve(third, EVE)  # without Ada's row


def test_rows_that_an_adapter_had_forgotten_are_lost_to_who_starts_without_it(
    http: TestClient, submit: Submit, serve: Serve, worker: Desk, ends: Ends
) -> None:
    """Also where that adapter was made for no request."""
    assert http.post(JOBS, json=job_body([ADA, EVE], [])).status_code == 201
    plain = worker.end()
    request = submit(ADA)
    assert http.post(JOBS, json=job_body([ADA], [request["id"]], parent=plain)).status_code == 201
    already = ends(forgotten_by(plain))
    assert http.get(f"{JOBS}/{already}").json()["verdict"]["forgotten_by"] == plain
    assert (
        show(http, request)["status_reason"]
        == f"job {already} on model 'm': job {plain} had forgotten the rows already"
    )
    third = {"text": "third"}
    refused = http.post(JOBS, json=job_body([third], [submit(third)["id"]]))
    [wrong] = problem(refused, 422, "validation-error")["errors"]
    assert (wrong["code"], f"starts from {plain}" in wrong["detail"]) == ("fork", True)
    serve(third, ADA)  # which forgets it anew
    worker.end()
    serve({"text": "fourth"}, third, parent=plain)


def test_a_plan_goes_on_from_the_adapter_that_had_forgotten_the_rows(
    http: TestClient, submit: Submit, serve: Serve, worker: Desk, ends: Ends, upload: Callable[..., str], parts: Parts
) -> None:
    assert http.post(JOBS, json=job_body([ADA], [])).status_code == 201
    plain = worker.end()
    serve(ADA, parent=plain)
    ends(forgotten_by(plain))
    recipe = {
        "method": {"type": "pdu"},
        "constraint": {"epsilon": 0.3},
        "retain_set": upload("retain_set", [BOB]),
    }
    put = http.put(f"{deleting.PLANS}/m", json={"job": recipe, "window_seconds": 0, "requests_max": 1})
    assert put.status_code < 300, put.text
    request = submit(EVE)
    assert serve_deletions(parts) == 1
    [made] = show(http, request)["jobs"]
    assert http.get(f"{JOBS}/{made['id']}").json()["parent"] == plain


def test_a_later_job_measures_again_what_an_adapter_of_its_chain_had_forgotten(
    http: TestClient, serve: Serve, worker: Desk, ends: Ends, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    serve(ADA)
    first = worker.end()
    serve(EVE, parent=first)
    already = ends(forgotten_by(first))
    serve({"text": "third"}, parent=first)
    never = ends(reports.untrained())
    serve({"text": "fourth"}, parent=first)
    with sessions.begin() as s:
        s.add(
            Artifact(id="uart_r", job_id=first, name="report.json", key="k", media_type="m", bytes=1, sha256=64 * "a")
        )
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        told = assignment(s, claim, JobSpec.model_validate(claim.spec), settings, tmp_path, False)
    assert told.parent is not None
    assert [one.job_id for one in told.parent.chain] == [first, already]
    assert never not in [one.job_id for one in told.parent.chain]


def test_a_certificate_of_what_was_forgotten_already_is_about_that_adapter(
    http: TestClient, serve: Serve, worker: Desk, ends: Ends, sessions: Sessions, settings: Settings
) -> None:
    serve(ADA)
    first = worker.end()
    serve(EVE, parent=first)
    already = ends(forgotten_by(first))
    issue(sessions, settings)
    said = payload(http.get(f"{JOBS}/{already}/certificate"))
    assert said["subject"] == [{"name": "adapter_model.safetensors", "digest": {"sha256": "0" * 64}}]
    assert said["predicate"]["verdict"]["forgotten_by"] == first


def test_the_evidence_of_what_was_forgotten_already_has_that_adapter(
    http: TestClient,
    serve: Serve,
    ends: Ends,
    over_http: str,
    sessions: Sessions,
    settings: Settings,
    tmp_path: Path,
) -> None:
    first = serve(ADA)
    succeed(sessions, settings, first)
    named = [one for one in http.get(f"{JOBS}/{first}/artifacts").json()["data"] if one["name"].startswith("adapter/")]
    files = [AdapterFile(name=one["name"], bytes=one["bytes"], sha256=one["sha256"]) for one in named]
    serve(EVE, parent=first)
    already = ends(forgotten_by(first, files))
    assert issue(sessions, settings) == 2
    fetched = CliRunner().invoke(app, ["evidence", already, "--out", str(tmp_path / "there"), "--url", over_http])
    assert fetched.exit_code == 0, fetched.output
    command = fetched.stdout.split()
    verified = CliRunner().invoke(app, command[1:])
    assert verified.exit_code == 0, verified.output
    assert "verdict NOT_KNOWN, by rules 2: The adapter of job" in verified.stdout
    (tmp_path / "there" / "adapter" / "README.md").write_text("altered")
    assert CliRunner().invoke(app, command[1:]).exit_code == 1


def test_a_job_that_was_not_started_from_is_not_what_had_forgotten_the_rows(
    http: TestClient, serve: Serve, worker: Desk, ends: Ends, sessions: Sessions, settings: Settings
) -> None:
    serve(ADA)
    first = worker.end()
    serve(EVE, ADA)
    claims = ends(forgotten_by(first))
    issue(sessions, settings)
    assert "is not the one that it started from" in http.get(f"{JOBS}/{claims}/certificate").json()["detail"]
