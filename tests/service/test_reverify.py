"""A reverification over HTTP: who gets one, what it is, and what it leaves with the job that it reverifies."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service import terminal
from service.api.deps import Parts
from service.batches import serve_deletions
from service.cli import app
from service.domain.job import JobSpec, Verdict
from service.domain.report import AdapterFile, Released
from service.evidence import dsse
from service.settings import Settings
from service.store import files, jobs
from service.store.rows import ArtifactRow
from service.store.session import Sessions
from service.store.storage import Storage
from service.store.tables import Artifact, Job, Model
from tests.conftest import owner
from tests.service import deleting, test_evidence_routes
from tests.service.conftest import Bell
from tests.service.deleting import ADA, BOB, EVE, JOBS, PLANS, as_, job_body, problem, show
from tests.service.test_evidence_routes import ADAPTER, LOG, issue, succeed
from tests.worker import reports
from worker.assignment import assignment

Original = Callable[..., str]
Reverify = Callable[..., dict[str, Any]]

parts, submit, over_http = deleting.parts, deleting.submit, test_evidence_routes.url


@pytest.fixture
def original(http: TestClient, sessions: Sessions, settings: Settings) -> Original:
    """original(forget rows, requests, **fields of the job) -> the id of a job that released an adapter."""

    def released(forget: Any = (ADA,), requests: Any = (), changes: Any = (), **fields: Any) -> str:
        reply = http.post(JOBS, json=job_body([*forget], [*requests], **fields))
        assert reply.status_code == 201, reply.text
        succeed(sessions, settings, reply.json()["id"], **dict(changes))
        return str(reply.json()["id"])

    return released


@pytest.fixture
def reverify(http: TestClient) -> Reverify:
    """reverify(job_id) -> the new job as it was answered with."""

    def ask(job_id: str) -> dict[str, Any]:
        reply = http.post(f"{JOBS}/{job_id}/reverify")
        assert reply.status_code == 201, reply.text
        return dict(reply.json())

    return ask


def ends(sessions: Sessions, settings: Settings, result: str = "FAILED", **changes: Any) -> str:
    """The next reverification ended with this verdict and a report of it alone: its id. Jobs before it in the line run on."""
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        while claim is not None and "reverifies" not in claim.spec:
            claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        found = s.scalars(select(Artifact).where(Artifact.job_id == claim.spec["reverifies"]))
        named = [(one.name, one.bytes, one.sha256) for one in found if one.name.startswith("adapter/")]
    adapter = [AdapterFile(name=name, bytes=size, sha256=sha256) for name, size, sha256 in named]
    verdict = Verdict(result=result, gates=[], message="so it is", rules=2)
    parts: dict[str, Any] = {
        "job_id": claim.job_id,
        "reverifies": claim.spec["reverifies"],
        "released": Released(published=True, step=0, files=adapter, message="As it was.", load=None),
        "verdict": verdict,
    }
    key = f"jobs/{claim.job_id}/attempts/1/report.json"
    content = reports.make([], [], **parts | changes).model_dump_json().encode()
    row = ArtifactRow("report.json", key, "application/json", *Storage(settings.storage_url).write(key, [content]))
    with sessions.begin() as s:
        assert jobs.succeed(s, claim.job_id, claim.fence, verdict, [row])
    return claim.job_id


def payload(reply: Any) -> Any:
    assert reply.status_code == 200, reply.text
    return json.loads(dsse.from_json(reply.content).payload)


# --- what it is


def test_it_is_a_job_on_the_same_request_that_serves_nobody(
    http: TestClient, original: Original, submit: Any, bell: Bell
) -> None:
    request = submit(ADA)
    fields = {"seed": 7, "external_id": "ours", "metadata": {"ticket": "1"}, "due_at": "2100-01-01T00:00:00Z"}
    gate = {"metric": "forget/rouge_l_recall", "op": "<=", "threshold": 0.5}
    first = original(
        [ADA], [request["id"]], gates=[gate], audit={"relearn_steps": 1}, budget={"max_steps": 9}, **fields
    )
    before = http.get(f"{JOBS}/{first}").json()
    bell.rung.clear()
    reply = http.post(f"{JOBS}/{first}/reverify")
    made = reply.json()
    assert (reply.status_code, reply.headers["Location"]) == (201, f"{JOBS}/{made['id']}")
    assert reply.headers["ETag"]
    assert '"jobs";' in reply.headers["RateLimit-Policy"], "counted as a creation is"
    assert bell.rung == [made["resources"]["gpu_class"]]
    assert (made["reverifies"], made["status"], made["verdict"]) == (first, "queued", None)
    assert (made["deletion_requests"], made["due_at"], made["progress"]["total"]) == ([], None, None)
    same = (
        "model",
        "method",
        "constraint",
        "budget",
        "lora",
        "seed",
        "audit",
        "gates",
        "parent",
        "resources",
        "limits",
    )
    for name in (*same, "forget_set", "retain_set", "external_id", "metadata", "priority", "benchmarks"):
        assert made[name] == before[name], name
    assert http.get(f"{JOBS}/{made['id']}").json() == made
    assert (before["reverifies"], http.get(f"{JOBS}/{first}").json()) == (None, before)
    assert [one["id"] for one in show(http, request)["jobs"]] == [first]
    noted = http.get(LOG, params={"object_id": made["id"]}).json()["data"]
    assert [(one["action"], one["data"].get("reverifies")) for one in noted] == [("job.created", first)]


def test_its_assignment_has_what_was_released_and_where_that_started_from(
    http: TestClient, original: Original, reverify: Reverify, sessions: Sessions, settings: Settings, tmp_path: Path
) -> None:
    first = original()
    second = original([EVE], parent=first)
    reverify(second)
    with sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        assigned = assignment(s, claim, JobSpec.model_validate(claim.spec), settings, tmp_path, False)
    assert assigned.reverified is not None
    assert (assigned.reverified.job_id, assigned.reverified.report.name) == (second, "report.json")
    assert [one.name for one in assigned.reverified.adapter] == [f"adapter/{name}" for name in ADAPTER]
    assert {one.key.split("/")[1] for one in [*assigned.reverified.adapter, assigned.reverified.report]} == {second}
    assert assigned.parent is not None
    assert assigned.parent.job_id == first
    assert assigned.deletion_requests == []


def test_a_spec_of_before_there_were_reverifications_is_reverified(
    http: TestClient, original: Original, reverify: Reverify, sessions: Sessions
) -> None:
    """With the fields alone that the first version had, and must have."""
    first = original()
    needed = ("model", "method", "constraint", "budget", "forget_set", "retain_set")
    with sessions.begin() as s:
        job = jobs.get(s, first)
        assert "reverifies" not in job.spec
        job.spec = {name: job.spec[name] for name in needed}
    assert reverify(first)["reverifies"] == first


def test_a_creation_cannot_ask_for_one(http: TestClient, original: Original) -> None:
    refused = http.post(JOBS, json=job_body([ADA], [], reverifies=original()))
    [wrong] = problem(refused, 422, "validation-error")["errors"]
    assert wrong["pointer"] == "/reverifies"


# --- who gets one


def test_it_is_refused_where_it_could_not_be_evaluated(
    http: TestClient, original: Original, sessions: Sessions
) -> None:
    def purged(s: Session, job: Job) -> None:
        files.purge(s, job.forget_set)

    def without_its_benchmark(s: Session, job: Job) -> None:
        job.spec = job.spec | {"benchmarks": ["gone"]}

    def of_a_later_version(s: Session, job: Job) -> None:
        job.spec = job.spec | {"of_tomorrow": 1}

    def not_known(s: Session, job: Job) -> None:
        job.verdict = {**(job.verdict or {}), "result": "NOT_KNOWN"}

    def of_other_weights(s: Session, job: Job) -> None:
        s.execute(update(Model).values(digest="sha256:" + 64 * "0"))

    def of_another_revision(s: Session, job: Job) -> None:
        s.execute(update(Model).values(digest=reports.DIGEST, revision=40 * "0"))

    def without_its_model(s: Session, job: Job) -> None:
        s.execute(delete(Model))

    for spoil, words in {
        purged: "cannot be reverified: no file 'ufile_",
        without_its_benchmark: "cannot be reverified: no benchmark 'gone' any more",
        of_a_later_version: "another version of the service wrote the job's spec",
        not_known: "released no adapter to reverify: the model did not know its rows",
        of_other_weights: "model 'm' is registered with digest sha256:000",
        of_another_revision: "model 'm' is registered with revision 000",
        without_its_model: "cannot be reverified: no model 'm' any more",
    }.items():
        with sessions.begin() as s:
            s.execute(update(Model).values(digest=None, revision=None))
        first = original()
        with sessions.begin() as s:
            spoil(s, jobs.get(s, first))
        refusal = problem(http.post(f"{JOBS}/{first}/reverify"), 409, "invalid-transition")
        assert words in refusal["detail"]
    with sessions.begin() as s:
        assert not s.scalars(select(Job.id).where(Job.spec.has_key("reverifies"))).all()


def test_a_job_that_released_nothing_is_not_reverified(
    http: TestClient, original: Original, sessions: Sessions
) -> None:
    first = original()
    with owner(sessions).begin() as connection:
        connection.execute(delete(Artifact).where(Artifact.name.startswith("adapter/")))
    refusal = problem(http.post(f"{JOBS}/{first}/reverify"), 409, "invalid-transition")
    assert refusal["detail"] == "the job released no adapter to reverify"


def test_the_model_may_be_registered_as_it_was(original: Original, reverify: Reverify, sessions: Sessions) -> None:
    first = original()
    with sessions.begin() as s:
        s.execute(update(Model).values(digest=reports.DIGEST))
    reverify(first)


def test_a_job_that_has_not_succeeded_is_not_reverified(
    http: TestClient, sessions: Sessions, settings: Settings
) -> None:
    waits = http.post(JOBS, json=job_body([ADA], [])).json()["id"]
    refusal = problem(http.post(f"{JOBS}/{waits}/reverify"), 409, "invalid-transition")
    assert refusal["detail"] == "the job is queued; only one that has succeeded can be reverified"
    assert http.post(f"{JOBS}/{waits}/cancel").status_code == 202
    refusal = problem(http.post(f"{JOBS}/{waits}/reverify"), 409, "invalid-transition")
    assert refusal["detail"] == "the job is cancelled; only one that has succeeded can be reverified"


def test_a_reverification_is_not_reverified(
    http: TestClient, original: Original, reverify: Reverify, sessions: Sessions, settings: Settings
) -> None:
    first = original()
    reverify(first)
    refusal = problem(http.post(f"{JOBS}/{ends(sessions, settings)}/reverify"), 409, "invalid-transition")
    assert refusal["detail"] == f"the job is itself a reverification; reverify job {first}"
    reverify(first)


def test_of_another_tenants_job_nothing_is_seen(
    http: TestClient, original: Original, make_key: Callable[..., str]
) -> None:
    first = original()
    stranger = as_(make_key("admin", "other"))
    problem(http.post(f"{JOBS}/{first}/reverify", headers=stranger), 404, "not-found")
    problem(http.post(f"{JOBS}/ujob_{32 * '0'}/reverify"), 404, "not-found")
    refusal = problem(
        http.post(f"{JOBS}/{first}/reverify", headers=as_(make_key("auditor"))), 403, "insufficient-scope"
    )
    assert refusal["required_scopes"] == ["jobs:create"]


def test_what_is_sent_twice_is_made_once(http: TestClient, original: Original) -> None:
    first, key = original(), {"Idempotency-Key": '"k"'}
    one, two = (http.post(f"{JOBS}/{first}/reverify", headers=key) for _ in range(2))
    assert (one.status_code, two.status_code, two.json()) == (201, 201, one.json())
    assert (two.headers["Idempotent-Replayed"], two.headers["Location"]) == ("true", one.headers["Location"])
    other = http.post(f"{JOBS}/{first}/reverify")
    assert other.json()["id"] != one.json()["id"]


# --- what follows it, and what does not


def test_it_is_no_parent_and_completes_and_reopens_no_request(
    http: TestClient,
    original: Original,
    reverify: Reverify,
    submit: Any,
    upload: Callable[..., str],
    sessions: Sessions,
    settings: Settings,
    parts: Parts,
) -> None:
    request = submit(ADA)
    first = original([ADA], [request["id"]])
    completed = show(http, request)
    assert completed["status"] == "completed"
    recipe = {"method": {"type": "pdu"}, "constraint": {"epsilon": 0.3}, "retain_set": upload("retain_set", [BOB])}
    plan = {"job": recipe, "window_seconds": 0, "requests_max": 1}
    assert http.put(f"{PLANS}/m", json=plan).status_code < 300
    reverify(first)
    later = submit(EVE)
    assert serve_deletions(parts) == 1, "a reverification that waits keeps no request waiting"
    [made] = show(http, later)["jobs"]
    assert http.get(f"{JOBS}/{made['id']}").json()["parent"] == first
    failed = ends(sessions, settings, "FAILED")
    assert show(http, request) == completed

    refused = http.post(JOBS, json=job_body([EVE], [], parent=failed))
    [wrong] = problem(refused, 422, "validation-error")["errors"]
    assert (wrong["pointer"], wrong["detail"]) == (
        "/parent",
        f"job {failed} is a reverification of job {first} and has no adapter of its own; start from that job",
    )


@pytest.mark.parametrize("result", ["PASSED", "FAILED"])
def test_its_certificate_is_about_the_same_adapter_and_the_original_gets_an_event(
    result: str,
    http: TestClient,
    original: Original,
    reverify: Reverify,
    sessions: Sessions,
    settings: Settings,
) -> None:
    first = original()
    assert issue(sessions, settings) == 1
    old, seen = http.get(f"{JOBS}/{first}/certificate"), http.get(f"{JOBS}/{first}")
    reverify(first)
    new = ends(sessions, settings, result)
    assert http.get(f"{JOBS}/{first}").headers["ETag"] == seen.headers["ETag"], "until the certificate is there"
    assert issue(sessions, settings) == 1

    statement = payload(http.get(f"{JOBS}/{new}/certificate"))
    assert statement["predicateType"] == "urn:unlearning-service:reverification:v1"
    assert statement["subject"] == payload(old)["subject"]
    assert (statement["predicate"]["job_id"], statement["predicate"]["reverifies"]) == (new, first)
    assert (statement["predicate"]["verdict"]["result"], statement["predicate"]["verdict"]["rules"]) == (result, 2)
    result_statement = payload(http.get(f"{JOBS}/{new}/test-result"))
    assert (result_statement["predicate"]["result"], result_statement["subject"]) == (result, statement["subject"])

    now = http.get(f"{JOBS}/{first}")
    assert now.headers["ETag"] != seen.headers["ETag"]
    assert now.json()["version"] == seen.json()["version"] + 1
    assert (now.json()["verdict"], now.json()["result"]) == (seen.json()["verdict"], seen.json()["result"])
    assert http.get(f"{JOBS}/{first}/certificate").content == old.content
    certificate = http.get(f"{JOBS}/{new}").json()["result"]["certificate"]
    data = {"job": new, "verdict": result, "rules": 2, "certificate": certificate}
    last = http.get(f"{JOBS}/{first}/events").json()["data"][-1]
    assert (last["type"], last["data"], last["level"]) == (
        "job.reverified",
        data,
        "warn" if result == "FAILED" else "info",
    )
    assert last["message"] == f"job {new} reverified the adapter: {result} by rules 2"
    entry = http.get(LOG, params={"object_id": first}).json()["data"][-1]
    assert entry["action"] == "job.reverified"
    assert {name: entry["data"][name] for name in data} == data
    assert test_evidence_routes.checked(sessions).fault is None
    assert issue(sessions, settings) == 0, "once"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reverifies": None}, "its report is not on the adapter that it was to evaluate"),
        ({"released": Released(published=True, step=0, files=[], message="", load=None)}, "is not the one that was"),
    ],
)
def test_a_report_on_another_adapter_is_not_certified_and_leaves_no_event(
    changes: dict[str, Any],
    words: str,
    http: TestClient,
    original: Original,
    reverify: Reverify,
    sessions: Sessions,
    settings: Settings,
) -> None:
    first = original()
    reverify(first)
    new = ends(sessions, settings, **changes)
    issue(sessions, settings)
    assert words in http.get(f"{JOBS}/{new}/certificate").json()["detail"]
    assert "job.reverified" not in [one["type"] for one in http.get(f"{JOBS}/{first}/events").json()["data"]]


# --- from a shell


def test_the_evidence_of_it_verifies_with_the_adapter_of_the_original(
    http: TestClient,
    original: Original,
    reverify: Reverify,
    over_http: str,
    sessions: Sessions,
    settings: Settings,
    tmp_path: Path,
) -> None:
    first = original()
    reverify(first)
    new = ends(sessions, settings)
    assert issue(sessions, settings) == 2
    fetched = CliRunner().invoke(app, ["evidence", new, "--out", str(tmp_path / "there"), "--url", over_http])
    assert fetched.exit_code == 0, fetched.output
    command = fetched.stdout.split()[1:]
    verified = CliRunner().invoke(app, command)
    assert verified.exit_code == 0, verified.output
    assert f"a reverification of job {first}: its adapter, under verdict rules 2" in verified.stdout
    assert "verdict FAILED, by rules 2" in verified.stdout
    (tmp_path / "there" / "adapter" / "README.md").write_text("altered")
    assert CliRunner().invoke(app, command).exit_code == 1


def test_the_command_ends_as_the_verdict_says(
    http: TestClient,
    original: Original,
    over_http: str,
    sessions: Sessions,
    settings: Settings,
    make_key: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("mlops"))
    monkeypatch.setattr(terminal, "POLL_S", 0.02)
    first = original()
    submitted = CliRunner().invoke(app, ["reverify", first, "--url", over_http])
    assert submitted.exit_code == 0, submitted.output
    assert http.get(f"{JOBS}/{submitted.stdout.strip()}").json()["reverifies"] == first
    assert http.post(f"{JOBS}/{submitted.stdout.strip()}/cancel").status_code == 202

    for result, code in (("WARNED", 0), ("FAILED", 1)):
        worker = threading.Timer(0.5, ends, (sessions, settings, result))
        worker.start()
        watched = CliRunner().invoke(app, ["reverify", first, "--watch", "--url", over_http])
        worker.join()
        assert (watched.exit_code, f"{result}: so it is" in watched.stdout) == (code, True), watched.output
    refused = CliRunner().invoke(app, ["reverify", submitted.stdout.strip(), "--url", over_http])
    assert (refused.exit_code, f"reverify job {first}" in refused.stderr) == (2, True)
