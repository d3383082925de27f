"""The whole life of a deletion request, over HTTP, with the sweep and what a worker does to its jobs."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service import batches
from service.api.deps import Parts
from service.batches import serve_deletions
from service.domain import catalog, deletion
from service.domain.deletion import TRANSITIONS, Denial, DenialReason, Regulation, RequestStatus
from service.domain.errors import InvalidTransition
from service.domain.identity import Principal
from service.domain.job import Failure, FailureCode, JobSpec, ModelEntry, PromptFormat, Verdict
from service.settings import Settings
from service.store import deletion_plans, deletions, files, jobs, models, tenancy
from service.store.rows import ArtifactRow, Claim
from service.store.secrets import Secrets, secrets_of
from service.store.session import Sessions, make_sessions
from service.store.storage import Storage
from service.store.tables import AuditEvent, DeletionApproval, DeletionPlan, DeletionRequest, File, Job, Tenant
from service.sweep import purge_due, sweep_once
from tests.service.conftest import Bell
from worker.assignment import assignment

REQUESTS = "/v1/deletion-requests"
PLANS = "/v1/deletion-plans"
JOBS = "/v1/unlearning/jobs"
ADA = {"question": "Who is Ada?", "answer": "A poet."}
EVE = {"text": "Eve lives in Ghent."}
BOB = {"question": "Who is Bob?", "answer": "A baker."}
PASSED = Verdict(result="PASSED", gates=[], message="passed")
FAILED = Verdict(result="FAILED", gates=[], message="failed")
ADAPTER = ArtifactRow("adapter/adapter_model.safetensors", "jobs/a", "application/octet-stream", 1, "0" * 64)


def asked(*rows: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {"regulation": "gdpr", "models": ["m"], "forget_set": list(rows or [ADA]), **fields}


@pytest.fixture
def approvals(sessions: Sessions) -> Callable[[int], None]:
    """approvals(n): the default tenant wants as many from now on."""

    def want(count: int) -> None:
        with sessions.begin() as s:
            s.execute(update(Tenant).values(approvals=count))

    return want


@pytest.fixture
def submit(http: TestClient) -> Callable[..., dict[str, Any]]:
    """submit(*rows, **fields) -> the request as it was answered with."""

    def send(*rows: dict[str, str], **fields: Any) -> dict[str, Any]:
        reply = http.post(REQUESTS, json=asked(*rows, **fields))
        assert reply.status_code == 201, reply.text
        return dict(reply.json())

    return send


@pytest.fixture
def parts(settings: Settings, http: TestClient, sessions: Sessions, bell: Bell) -> Parts:
    """The sweep's: they see every tenant."""
    unbound = make_sessions(sessions.kw["bind"])
    storage = Storage(settings.storage_url)
    return Parts(settings, unbound, storage, bell, catalog.load(), secrets_of(settings), None)


class Desk(NamedTuple):
    """A worker, to the database."""

    sessions: Sessions

    def claim(self) -> Claim:
        with self.sessions.begin() as s:
            claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
            assert claim is not None
            return claim

    def end(self, verdict: Verdict = PASSED) -> str:
        """The next job ends with this verdict: its id."""
        claim = self.claim()
        with self.sessions.begin() as s:
            assert jobs.succeed(s, claim.job_id, claim.fence, verdict, [ADAPTER])
        return claim.job_id

    def fail(self) -> str:
        claim = self.claim()
        failure = Failure.of(FailureCode.NON_FINITE_LOSS, "it blew up")
        with self.sessions.begin() as s:
            jobs.fail(s, claim.job_id, claim.fence, failure)
        return claim.job_id


@pytest.fixture
def worker(parts: Parts) -> Desk:
    return Desk(parts.sessions)


def show(http: TestClient, request: dict[str, Any]) -> dict[str, Any]:
    reply = http.get(f"{REQUESTS}/{request['id']}")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def problem(reply: Any, status: int, kind: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = reply.json()
    assert found["type"].endswith(f"#{kind}")
    return found


# --- what comes in


def test_a_request_is_kept_without_its_subject_and_its_rows(
    http: TestClient, submit: Callable[..., dict[str, Any]], sessions: Sessions, settings: Settings
) -> None:
    reply = http.post(REQUESTS, json=asked(ADA, EVE, subjects=["Ada@Example.org"], external_reference="T-7"))
    made = reply.json()
    assert (reply.status_code, reply.headers["location"]) == (201, f"{REQUESTS}/{made['id']}")
    assert (made["status"], made["rows"], made["models"]) == ("approved", 2, ["m"])
    assert (made["approvals_required"], made["overdue"], made["jobs"]) == (0, False, [])
    assert 27 * 86400 < made["due_in_seconds"] <= 31 * 86400
    assert "ada@example" not in reply.text.lower()
    assert "Ghent" not in reply.text
    with sessions.begin() as s:
        stored = s.execute(text("SELECT row_to_json(r)::text FROM deletion_requests r")).scalar_one()
        with files.content(
            Storage(settings.storage_url), secrets_of(settings), files.get(s, made["forget_set"])
        ) as rows:
            assert [json.loads(line) for line in rows] == [ADA, EVE]
        told = s.scalars(select(AuditEvent).where(AuditEvent.object_id == made["id"]).order_by(AuditEvent.seq)).all()
    assert "example" not in stored.lower()
    assert "Ghent" not in stored
    assert [event.action for event in told] == ["deletion_request.received", "deletion_request.approved"]
    assert "T-7" not in json.dumps([event.data for event in told])


def test_a_request_is_found_by_its_subject_whatever_its_capitals(
    http: TestClient, submit: Callable[..., dict[str, Any]], make_key: Callable[..., str]
) -> None:
    ada, _ = submit(subjects=["Ada@Example.org", "ada-7"]), submit(subjects=["eve@example.org"])

    def found(**query: str) -> list[str]:
        return [one["id"] for one in http.get(REQUESTS, params=query).json()["data"]]

    assert found(subject=" ada@example.ORG ") == [ada["id"]] == found(subject="ada-7")
    assert found(subject="ada") == []
    other = make_key("admin", "other")
    assert http.get(REQUESTS, params={"subject": "ada-7"}, headers=as_(other)).json()["data"] == []


def test_lists_have_filters_and_pages(http: TestClient, submit: Callable[..., dict[str, Any]]) -> None:
    first = submit(external_reference="a", regulation="ccpa")
    second, third = submit(), submit(regulation="other", due_at="2999-01-01T00:00:00Z")
    http.post(f"{REQUESTS}/{second['id']}/cancel")

    def found(**query: Any) -> list[str]:
        return [one["id"] for one in http.get(REQUESTS, params=query).json()["data"]]

    assert found() == [third["id"], second["id"], first["id"]]
    assert found(status="cancelled") == [second["id"]]
    assert found(regulation="ccpa") == found(external_reference="a") == [first["id"]]
    assert found(due_before="2998-01-01T00:00:00Z") == [second["id"], first["id"]]
    page = http.get(REQUESTS, params={"limit": 2, "status": "approved", "order": "asc"})
    assert (page.json()["has_more"], page.json()["last_id"]) == (False, third["id"])
    page = http.get(REQUESTS, params={"limit": 1, "status": "approved"})
    assert [one["id"] for one in http.get(page.links["next"]["url"]).json()["data"]] == [first["id"]]


def test_deadlines_are_the_laws(submit: Callable[..., dict[str, Any]]) -> None:
    for regulation, received, due, extended in [
        ("gdpr", "2026-01-31T09:00:00Z", "2026-02-28T09:00:00Z", "2026-04-30T09:00:00Z"),
        ("gdpr", "2024-01-31T23:59:59Z", "2024-02-29T23:59:59Z", "2024-04-30T23:59:59Z"),
        ("gdpr", "2025-11-30T00:00:00Z", "2025-12-30T00:00:00Z", "2026-02-28T00:00:00Z"),
        ("gdpr", "2025-12-31T00:00:00+02:00", "2026-01-30T22:00:00Z", "2026-03-30T22:00:00Z"),
        ("ccpa", "2026-01-31T09:00:00Z", "2026-03-17T09:00:00Z", "2026-05-01T09:00:00Z"),
    ]:
        assert submit(regulation=regulation, received_at=received)["due_at"] == due
        latest = deletion.due_extended(Regulation(regulation), datetime.fromisoformat(received).astimezone(UTC))
        assert latest == datetime.fromisoformat(extended)


def test_what_cannot_be_carried_out_is_named_and_nothing_is_kept(
    http: TestClient, sessions: Sessions, settings: Settings
) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"regulation": "other"}, "give due_at"),
        ({"received_at": "2999-01-01T00:00:00Z"}, "in the future"),
        ({"received_at": "2026-01-02T00:00:00Z", "due_at": "2026-01-01T00:00:00Z"}, "not after received_at"),
        (
            {"received_at": "2026-01-31T00:00:00Z", "due_at": "2026-02-28T00:00:01Z"},
            "/due_at by gdpr it is due at 2026-02-28",
        ),
        ({"models": ["m", "nobody"]}, "/models/1 model 'nobody' is not registered"),
        ({"models": ["m", "m"]}, "names a model twice"),
        ({"models": []}, "/models"),
        ({"forget_set": [{"text": " "}]}, "/forget_set/0 row 1: text is empty"),
        ({"forget_set": "ufile_" + "0" * 32}, "there is no file"),
        ({"subject": "ada"}, "/subject"),
    ]
    for fields, said in wrong:
        found = problem(http.post(REQUESTS, json=asked() | fields), 422, "validation-error")
        assert said in found["detail"]
    with sessions.begin() as s:
        assert s.scalar(select(func.count()).select_from(File)) == 0
    assert not list(Storage(settings.storage_url).ages(files.FOLDER))


def test_a_file_of_another_purpose_is_refused(http: TestClient, upload: Callable[..., str]) -> None:
    file = upload("retain_set", [ADA])
    assert (
        "not as forget_set"
        in problem(http.post(REQUESTS, json=asked(forget_set=file)), 422, "validation-error")["detail"]
    )


def test_what_is_sent_twice_under_one_key_is_one_request(http: TestClient) -> None:
    key = {"Idempotency-Key": '"a-1"'}
    first, second = (http.post(REQUESTS, json=asked(ADA), headers=key) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json()["id"] == first.json()["id"]
    assert second.headers["location"] == first.headers["location"]
    problem(http.post(REQUESTS, json=asked(EVE), headers=key), 422, "idempotency-key-reused")
    assert len(http.get(REQUESTS).json()["data"]) == 1


def test_a_batch_answers_for_each(http: TestClient) -> None:
    ok, wrong = asked(EVE), asked(forget_set=[{"text": "a", "answer": "b"}])
    unknown = asked(models=["nobody"])
    reply = http.post(f"{REQUESTS}/batch", json={"requests": [ok, wrong, unknown, {"models": ["m"]}, ok]})
    assert reply.status_code == 200
    results = reply.json()["results"]
    assert [one["index"] for one in results] == [0, 1, 2, 3, 4]
    assert [one["status"] for one in results] == [201, 422, 422, 422, 201]
    assert [one["object"] is None for one in results] == [False, True, True, True, False]
    assert results[0]["object"]["status"] == "approved"
    assert results[0]["problem"] is None
    pointers = [[error["pointer"] for error in one["problem"]["errors"]] for one in results[1:4]]
    assert pointers == [["/forget_set/0"], ["/models/0"], ["/regulation", "/forget_set"]]
    assert len(http.get(REQUESTS).json()["data"]) == 2
    problem(http.post(f"{REQUESTS}/batch", json={"requests": [ok] * 101}), 422, "validation-error")


def test_a_batch_that_is_sent_again_makes_only_what_was_not_made(http: TestClient) -> None:
    def send(*requests: dict[str, Any]) -> list[dict[str, Any]]:
        sent = http.post(f"{REQUESTS}/batch", json={"requests": requests}, headers={"Idempotency-Key": '"b-1"'})
        return list(sent.json()["results"])

    ok, wrong = asked(EVE), asked(models=["nobody"])
    first = send(ok, wrong, ok)
    assert [one["status"] for one in first] == [201, 422, 201]
    again = send(ok, asked(ADA), asked(ADA))  # the second mended, the third another than before
    assert [one["status"] for one in again] == [201, 201, 422]
    assert again[0] == first[0]
    assert again[2]["problem"]["type"].endswith("#idempotency-key-reused")
    assert len(http.get(REQUESTS).json()["data"]) == 3


def test_another_tenants_request_is_not_there(
    http: TestClient, submit: Callable[..., dict[str, Any]], make_key: Callable[..., str]
) -> None:
    path, other = f"{REQUESTS}/{submit()['id']}", as_(make_key("admin", "other"))
    bodies = {"deny": {"reason": "other"}, "extend": {"reason": "r"}, "close": {"reason": "r"}}
    problem(http.get(path, headers=other), 404, "not-found")
    for verb in ("approve", "cancel", *bodies):
        problem(http.post(f"{path}/{verb}", json=bodies.get(verb), headers=other), 404, "not-found")
    assert http.get(REQUESTS, headers=other).json()["data"] == []
    job = job_body([ADA], [path.rpartition("/")[2]])
    found = problem(http.post(JOBS, json=job, headers=other), 422, "validation-error")
    assert found["errors"][0]["pointer"] == "/deletion_requests/0"


# --- what people decide


def test_two_others_approve(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    make_key: Callable[..., str],
    approvals: Callable[[int], None],
) -> None:
    approvals(2)
    made = submit()
    assert (made["status"], made["approvals_required"]) == ("pending_approval", 2)
    path = f"{REQUESTS}/{made['id']}/approve"
    assert "does not approve it" in problem(http.post(path), 409, "invalid-transition")["detail"]
    problem(http.post(path, headers=as_(make_key("compliance_submitter"))), 403, "insufficient-scope")
    one, two = as_(make_key("compliance_approver")), as_(make_key("compliance_approver"))
    first = http.post(path, headers=one).json()
    assert (first["status"], len(first["approvals"]), first["version"]) == ("pending_approval", 1, made["version"] + 1)
    again = http.post(path, headers=one).json()
    assert (again["status"], again["version"]) == ("pending_approval", first["version"])
    approvals(0)  # a request keeps the number with which it began
    second = http.post(path, headers=two).json()
    assert (second["status"], len({given["by"] for given in second["approvals"]})) == ("approved", 2)
    lost = http.post(path, headers=two).json()  # whose answer never came asks again
    assert (lost["status"], lost["version"]) == ("approved", second["version"])
    problem(http.post(path, headers=as_(make_key("compliance_approver"))), 409, "invalid-transition")


def test_the_database_refuses_the_submitter(
    submit: Callable[..., dict[str, Any]], approvals: Callable[[int], None], sessions: Sessions
) -> None:
    approvals(1)
    made = submit()
    by, else_ = made["created_by"], "key_else"
    with pytest.raises(IntegrityError, match="four_eyes"), sessions.begin() as s:
        s.add(DeletionApproval(request_id=made["id"], approved_by=by, submitted_by=by))
    with pytest.raises(IntegrityError, match="fkey"), sessions.begin() as s:  # nor under a false name of the submitter
        s.add(DeletionApproval(request_id=made["id"], approved_by=by, submitted_by=else_))


def test_two_approvals_at_once_both_count(
    submit: Callable[..., dict[str, Any]], approvals: Callable[[int], None], sessions: Sessions
) -> None:
    approvals(2)
    ids = [submit(dict(ADA, answer=str(number)))["id"] for number in range(6)]

    def approve(by: str, request_id: str) -> None:
        with tenancy.bound(sessions, "default", by).begin() as s:
            deletions.approve(s, request_id)

    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(approve, by, request_id) for request_id in ids for by in ("key_a", "key_b")]
        for task in tasks:
            task.result()
    with sessions.begin() as s:
        found = s.scalars(select(DeletionRequest)).all()
        assert [(row.status, row.version) for row in found] == [("approved", 3)] * 6
        assert all(row.approved_at is not None for row in found)


def test_if_match_is_heard(http: TestClient, submit: Callable[..., dict[str, Any]]) -> None:
    made = submit()
    path = f"{REQUESTS}/{made['id']}"
    tag = http.get(path).headers["etag"]
    assert tag == f'"{made["version"]}"'
    assert http.get(path, headers={"If-None-Match": tag}).status_code == 304
    changed = http.post(f"{path}/extend", json={"reason": "many systems"}, headers={"If-Match": tag})
    assert (changed.status_code, changed.headers["etag"] == tag) == (200, False)
    assert http.get(path, headers={"If-None-Match": tag}).status_code == 200
    deny = {"reason": "no_match"}
    for stale in (tag, 'W/"2"', "nonsense"):
        problem(http.post(f"{path}/deny", json=deny, headers={"If-Match": stale}), 412, "precondition-failed")
    match = {"If-Match": f'"99", {changed.headers["etag"]}'}
    assert http.post(f"{path}/deny", json=deny, headers=match).json()["status"] == "denied"


@pytest.mark.parametrize("verb", ["deny", "cancel"])
def test_what_is_denied_or_taken_back_is_purged(
    http: TestClient, submit: Callable[..., dict[str, Any]], upload: Callable[..., str], parts: Parts, verb: str
) -> None:
    file = upload("forget_set", [ADA])
    one, two = submit(forget_set=file), submit(forget_set=file)
    problem(http.delete(f"/v1/files/{file}"), 409, "invalid-transition")
    body = {"reason": "claim_not_covered", "note": "not a customer"} if verb == "deny" else None
    path = f"{REQUESTS}/{{}}/{verb}"
    ended = http.post(path.format(one["id"]), json=body).json()
    assert (ended["status"], ended["finished_at"] is None, ended["due_in_seconds"]) in [
        ("denied", False, None),
        ("cancelled", False, None),
    ]
    if verb == "deny":
        by = one["created_by"]
        assert ended["denial"] == {"reason": "claim_not_covered", "note": "not a customer", "by": by}
        problem(http.post(path.format(two["id"]), json={"reason": "I like it"}), 422, "validation-error")
    assert purge_due(parts.sessions, parts.storage) == 0  # the other needs it
    assert http.get(f"/v1/files/{file}").json()["purge_at"] is None  # and goes on to when it is done
    http.post(path.format(two["id"]), json=body)
    assert purge_due(parts.sessions, parts.storage) == 1
    assert http.get(f"/v1/files/{file}").json()["purged_at"] is not None
    assert not list(parts.storage.ages(files.FOLDER))
    problem(http.post(f"{REQUESTS}/{one['id']}/extend", json={"reason": "r"}), 409, "invalid-transition")


def test_a_deadline_is_extended_once_by_what_the_law_allows(
    http: TestClient, submit: Callable[..., dict[str, Any]], sessions: Sessions
) -> None:
    made = submit()
    path = f"{REQUESTS}/{made['id']}/extend"
    received = datetime.fromisoformat(made["received_at"])
    too_late = (deletion.months_after(received, 3) + timedelta(seconds=1)).isoformat()
    for until in (too_late, made["due_at"]):
        problem(http.post(path, json={"reason": "r", "due_at": until}), 422, "validation-error")
    problem(http.post(path, json={}), 422, "validation-error")
    extended = http.post(path, json={"reason": "many systems"}).json()
    assert datetime.fromisoformat(extended["due_at"]) == deletion.months_after(received, 3)
    assert extended["extension"] | {"at": ""} == {
        "reason": "many systems",
        "by": made["created_by"],
        "at": "",
        "due_before": made["due_at"],
    }
    assert "once" in problem(http.post(path, json={"reason": "r"}), 409, "invalid-transition")["detail"]
    other = submit(regulation="other", due_at="2998-01-01T00:00:00Z")
    path = f"{REQUESTS}/{other['id']}/extend"
    problem(http.post(path, json={"reason": "r"}), 422, "validation-error")
    assert http.post(path, json={"reason": "r", "due_at": "2999-01-01T00:00:00Z"}).status_code == 200
    late = submit(received_at="2026-01-31T00:00:00Z")
    refused = http.post(f"{REQUESTS}/{late['id']}/extend", json={"reason": "r"})
    assert "overdue" in problem(refused, 409, "invalid-transition")["detail"]


# --- the jobs that serve it


def job_body(forget: list[dict[str, str]], requests: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "method": {"type": "pdu"},
        "constraint": {"epsilon": 0.3},
        "forget_set": forget,
        "retain_set": [BOB],
        "deletion_requests": requests,
        **fields,
    }


def test_a_job_serves_the_requests_whose_rows_it_has(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    sessions: Sessions,
    worker: Desk,
    settings: Settings,
    tmp_path: Path,
) -> None:
    ada, both = submit(ADA), submit(EVE, ADA)
    found = problem(http.post(JOBS, json=job_body([ADA], [ada["id"], both["id"]])), 422, "validation-error")
    assert [(error["pointer"], error["code"]) for error in found["errors"]] == [("/deletion_requests/1", "row_missing")]
    assert f"row 1 of {both['id']}" in found["detail"]
    assert show(http, ada)["status"] == "approved"
    made = http.post(JOBS, json=job_body([{"text": "more"}, ADA, EVE], [ada["id"], both["id"]]))
    job = made.json()
    assert (made.status_code, job["deletion_requests"]) == (201, [ada["id"], both["id"]])
    with sessions.begin() as s:
        numbers = {link.request_id: link.row_numbers for link in deletions.served(s, job["id"])}
    assert numbers == {ada["id"]: [2], both["id"]: [2, 3]}
    shown = show(http, both)
    assert (shown["status"], shown["jobs"]) == ("in_progress", [{"id": job["id"], "model": "m"}])
    refused = problem(http.post(JOBS, json=job_body([ADA], [ada["id"]])), 422, "validation-error")
    assert "already" in refused["detail"]
    problem(http.post(f"{REQUESTS}/{ada['id']}/cancel"), 409, "invalid-transition")
    with worker.sessions() as s:  # rolled back: the worker is told which rows are whose, so that the report can tell
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
        assert claim is not None
        told = assignment(s, claim, JobSpec.model_validate(claim.spec), settings, tmp_path, False)
        assert {one.request_id: one.row_numbers for one in told.deletion_requests} == numbers
    worker.end()
    assert [show(http, one)["status"] for one in (ada, both)] == ["completed", "completed"]


def test_only_what_is_approved_is_served(
    http: TestClient, submit: Callable[..., dict[str, Any]], approvals: Callable[[int], None]
) -> None:
    approvals(1)
    waits = submit(ADA)["id"]
    nobody = "dreq_" + "0" * 32
    found = problem(http.post(JOBS, json=job_body([ADA], [waits, nobody, waits])), 422, "validation-error")
    assert [error["detail"].split()[-1] for error in found["errors"]] == ["approved", f"'{nobody}'", "twice"]


def test_it_is_completed_when_a_job_has_passed_for_every_model(
    http: TestClient, submit: Callable[..., dict[str, Any]], sessions: Sessions, worker: Desk
) -> None:
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="n", source="path", location="n", prompt_format=PromptFormat()))
    made = submit(ADA, models=["m", "n"])

    def ask(model: str) -> str:
        reply = http.post(JOBS, json=job_body([ADA], [made["id"]], model=model))
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    ask("m")
    worker.end(PASSED.model_copy(update={"result": "WARNED"}))
    assert show(http, made)["status"] == "in_progress"
    bad = ask("n")
    worker.end(FAILED)
    shown = show(http, made)
    assert (shown["status"], shown["status_reason"]) == ("failed", f"job {bad} on model 'n': the verdict is FAILED")
    blown = ask("n")
    assert (show(http, made)["status"], show(http, made)["status_reason"]) == ("in_progress", None)
    worker.fail()
    assert show(http, made)["status_reason"] == f"job {blown} on model 'n' failed: non_finite_loss"
    gone = ask("n")
    http.post(f"{JOBS}/{gone}/cancel")
    assert show(http, made)["status_reason"] == f"job {gone} on model 'n' cancelled"
    ask("n")
    worker.end()
    shown = show(http, made)
    assert (shown["status"], shown["status_reason"], len(shown["jobs"])) == ("completed", None, 5)
    assert shown["finished_at"] is not None


def test_a_job_that_is_tried_again_takes_its_request_along(
    http: TestClient, submit: Callable[..., dict[str, Any]], worker: Desk
) -> None:
    made = submit(ADA)
    http.post(JOBS, json=job_body([ADA], [made["id"]]))
    job = worker.fail()
    assert show(http, made)["status"] == "failed"
    assert http.post(f"{JOBS}/{job}/retry").status_code == 202
    assert (show(http, made)["status"], show(http, made)["status_reason"]) == ("in_progress", None)
    worker.end()
    assert show(http, made)["status"] == "completed"


def test_a_person_closes_what_failed(http: TestClient, submit: Callable[..., dict[str, Any]], worker: Desk) -> None:
    made = submit(ADA)
    path = f"{REQUESTS}/{made['id']}/close"
    problem(http.post(path, json={"reason": "r"}), 409, "invalid-transition")
    http.post(JOBS, json=job_body([ADA], [made["id"]]))
    worker.end(FAILED)
    problem(http.post(path, json={}), 422, "validation-error")
    closed = http.post(path, json={"reason": "the model was taken down"}).json()
    assert closed["status"] == "completed"
    assert closed["closing"] == {"reason": "the model was taken down", "by": made["created_by"]}


def test_who_submitted_what_wanted_approval_does_not_close_it(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    approvals: Callable[[int], None],
    make_key: Callable[..., str],
    worker: Desk,
) -> None:
    approvals(1)
    made = submit(ADA)
    other = as_(make_key("compliance_approver"))
    assert http.post(f"{REQUESTS}/{made['id']}/approve", headers=other).status_code == 200
    http.post(JOBS, json=job_body([ADA], [made["id"]]))
    worker.end(FAILED)
    path = f"{REQUESTS}/{made['id']}/close"
    assert "does not close it" in problem(http.post(path, json={"reason": "r"}), 409, "invalid-transition")["detail"]
    assert http.post(path, json={"reason": "r"}, headers=other).json()["status"] == "completed"


# --- the jobs that are made for it


@pytest.fixture
def plan(http: TestClient, upload: Callable[..., str]) -> Callable[..., dict[str, Any]]:
    """plan(window_seconds, requests_max, **fields of the job) -> as it was answered with."""

    def put(window_seconds: int = 0, requests_max: int = 2, **fields: Any) -> dict[str, Any]:
        job = {"method": {"type": "pdu"}, "constraint": {"epsilon": 0.3}, "retain_set": upload("retain_set", [BOB])}
        body = {"job": job | fields, "window_seconds": window_seconds, "requests_max": requests_max}
        reply = http.put(f"{PLANS}/m", json=body)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    return put


def the_job(http: TestClient, request: dict[str, Any]) -> dict[str, Any]:
    [job] = show(http, request)["jobs"]
    return dict(http.get(f"{JOBS}/{job['id']}").json())


def test_as_many_as_the_plan_says_make_one_job_with_the_rows_of_all(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    bell: Bell,
) -> None:
    plan(window_seconds=3600, requests_max=2, gates=[{"metric": "forget/rouge_l_recall", "op": "<=", "threshold": 0.5}])
    ada = submit(ADA, regulation="other", due_at="2998-01-01T00:00:00Z")
    assert serve_deletions(parts) == 0  # it waits for others
    eve, third = submit(EVE, ADA), submit({"text": "third"})
    assert (serve_deletions(parts), serve_deletions(parts)) == (1, 0)
    job = the_job(http, ada)
    assert job == the_job(http, eve)
    assert (job["created_by"], job["due_at"], job["parent"]) == ("system", min(eve["due_at"], ada["due_at"]), None)
    assert (job["deletion_requests"], len(job["gates"])) == ([ada["id"], eve["id"]], 1)
    with parts.sessions.begin() as s:
        file = files.get(s, job["forget_set"])
        with files.content(parts.storage, parts.secrets, file) as rows:
            assert [json.loads(line) for line in rows] == [ADA, EVE]
        assert (file.rows, file.created_by, file.purge_at) == (2, "system", None)
        numbers = {link.request_id: link.row_numbers for link in deletions.served(s, job["id"])}
    assert numbers == {ada["id"]: [1], eve["id"]: [1, 2]}
    assert (show(http, third)["status"], bell.rung) == ("approved", ["any"])


def test_the_window_ends_the_wait_and_the_next_job_starts_from_the_adapter_of_the_last(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    worker: Desk,
) -> None:
    plan(window_seconds=3600, requests_max=64)

    def an_hour_later() -> None:
        with parts.sessions.begin() as s:
            s.execute(update(DeletionRequest).values(approved_at=DeletionRequest.approved_at - timedelta(hours=1)))

    ada = submit(ADA)
    assert serve_deletions(parts) == 0
    an_hour_later()
    assert serve_deletions(parts) == 1
    eve = submit(EVE)
    an_hour_later()
    assert serve_deletions(parts) == 0  # the first still runs, and it is its adapter that the second must start from
    first = worker.end()
    assert show(http, ada)["status"] == "completed"
    assert serve_deletions(parts) == 1
    assert the_job(http, eve)["parent"] == first


def test_a_job_for_requests_starts_where_the_last_one_ended(
    http: TestClient, submit: Callable[..., dict[str, Any]], worker: Desk, parts: Parts
) -> None:
    def ask(**fields: Any) -> Any:
        row = dict(ADA, answer=str(len(http.get(REQUESTS).json()["data"])))
        return http.post(JOBS, json=job_body([row], [submit(row)["id"]], **fields))

    assert ask().status_code == 201
    first = worker.end()
    for wrong in ({}, {"parent": None}):
        found = problem(ask(**wrong), 422, "validation-error")["errors"]
        assert [(one["pointer"], one["code"], first in one["detail"]) for one in found] == [("/parent", "fork", True)]
    assert http.post(JOBS, json=job_body([EVE], [])).status_code == 201  # it serves none: no model of theirs
    beside = worker.end()
    assert problem(ask(parent=beside), 422, "validation-error")["errors"][0]["code"] == "fork"
    assert http.post(JOBS, json=job_body([EVE], [], parent=first)).status_code == 201
    assert ask(parent=worker.end()).status_code == 201  # what the first forgot is forgotten there, too
    second = worker.end()
    with parts.sessions.begin() as s:
        assert deletion_plans.latest(s, "default", "m") == second


def test_two_sweeps_make_one_job(
    http: TestClient, submit: Callable[..., dict[str, Any]], plan: Callable[..., dict[str, Any]], parts: Parts
) -> None:
    plan()
    made = [submit(dict(ADA, answer=str(number))) for number in range(2)]
    with ThreadPoolExecutor(3) as pool:
        served = [task.result() for task in [pool.submit(serve_deletions, parts) for _ in range(3)]]
    assert sum(served) == 1
    assert [len(show(http, one)["jobs"]) for one in made] == [1, 1]
    with parts.sessions.begin() as s:
        unused = select(File).where(File.created_by == "system", File.purged_at.is_(None))
        assert len(s.scalars(unused).all()) == 1
        assert s.scalars(select(DeletionPlan.status_reason)).all() == [None]


def test_a_request_for_what_must_be_kept_fails_and_the_others_go_on(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    upload: Callable[..., str],
    worker: Desk,
) -> None:
    plan(requests_max=3)
    bob, too, ada = submit(EVE, BOB), submit(BOB), submit(ADA)
    assert serve_deletions(parts) == 1
    assert the_job(http, ada)["deletion_requests"] == [ada["id"]]
    shown = show(http, bob)
    assert (shown["status"], shown["jobs"]) == ("failed", [])
    assert shown["status_reason"] == "model 'm': its row 2 is row 1 of the plan's retain set"
    assert show(http, too)["status"] == "failed"
    assert http.post(f"{REQUESTS}/{bob['id']}/cancel").json()["status"] == "cancelled"
    worker.end()
    assert serve_deletions(parts) == 0
    plan(requests_max=1, retain_set=upload("retain_set", [{"text": "other"}]))
    assert serve_deletions(parts) == 1
    assert (show(http, too)["status"], show(http, too)["status_reason"]) == ("in_progress", None)


def test_what_is_damaged_fails_alone(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
) -> None:
    long = {"text": "x" * 70_000}  # more than one chunk: it is the second that cannot be read
    plan(requests_max=4)
    whole, cut, lost, other = submit(ADA), submit(EVE, long), submit({"text": "lost"}), submit({"text": "other"})
    with parts.sessions.begin() as s:
        path = Path(parts.settings.storage_url.removeprefix("file://")) / files.get(s, cut["forget_set"]).key
        key = files.get(s, other["forget_set"]).sealed
        s.execute(update(File).where(File.id == lost["forget_set"]).values(sealed=key))
    path.write_bytes(path.read_bytes()[:-1])
    assert serve_deletions(parts) == 1
    assert the_job(http, whole)["deletion_requests"] == [whole["id"], other["id"]]
    assert "damaged" in show(http, cut)["status_reason"]
    assert "cannot be opened" in show(http, lost)["status_reason"]
    assert serve_deletions(parts) == 0


def test_a_wrong_master_key_is_no_requests_fault(
    http: TestClient, submit: Callable[..., dict[str, Any]], plan: Callable[..., dict[str, Any]], parts: Parts
) -> None:
    plan(requests_max=1)
    made = submit(ADA)
    assert serve_deletions(parts._replace(secrets=Secrets(b"?" * 32))) == 0
    assert show(http, made)["status"] == "approved"
    assert "another MASTER_KEY" in http.get(f"{PLANS}/m").json()["status_reason"]


def test_the_trouble_of_one_batch_does_not_stop_the_others(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    sessions: Sessions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = plan(requests_max=1)
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="n", source="path", location="n", prompt_format=PromptFormat()))
    http.put(f"{PLANS}/n", json={name: made[name] for name in ("job", "window_seconds", "requests_max")})
    one, two = submit(ADA), submit(EVE, models=["n"])
    serve, tried = batches._serve, list[str]()

    def once_broken(here: Parts, who: Principal, batch: deletion_plans.Batch) -> bool:
        tried.append(batch.plan.model)
        if len(tried) == 1:
            raise ValueError("unforeseen")
        return serve(here, who, batch)

    monkeypatch.setattr(batches, "_serve", once_broken)
    assert serve_deletions(parts) == 1
    assert sorted(tried) == ["m", "n"]
    assert {show(http, one)["status"], show(http, two)["status"]} == {"approved", "in_progress"}


def test_what_failed_for_one_model_is_served_for_the_others(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    sessions: Sessions,
    worker: Desk,
) -> None:
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="n", source="path", location="n", prompt_format=PromptFormat()))
    plan_of_n = plan(requests_max=1)
    failed, unfit = submit(ADA, models=["m", "n"]), submit(BOB, models=["m", "n"])
    assert serve_deletions(parts) == 1
    bad = worker.end(FAILED)
    assert serve_deletions(parts) == 0  # what the plan wants kept
    assert [show(http, one)["status"] for one in (failed, unfit)] == ["failed", "failed"]
    body = {name: plan_of_n[name] for name in ("job", "window_seconds")}
    http.put(f"{PLANS}/n", json=body | {"requests_max": 1})
    assert serve_deletions(parts) == 1
    shown, told = show(http, failed), f"job {bad} on model 'm': the verdict is FAILED"
    assert (shown["status"], shown["status_reason"]) == ("in_progress", told)  # nobody takes it back meanwhile
    worker.end()
    assert (show(http, failed)["status"], show(http, failed)["status_reason"]) == ("failed", told)
    assert (serve_deletions(parts), serve_deletions(parts)) == (0, 0)
    assert show(http, unfit)["status_reason"].count("is row 1 of the plan's retain set") == 2
    third = submit({"text": "third"})
    assert serve_deletions(parts) == 1  # though an older one is there that cannot be served
    assert the_job(http, third)["deletion_requests"] == [third["id"]]


def test_a_plan_of_which_no_job_can_be_made_is_suspended_until_it_is_put_anew(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    upload: Callable[..., str],
) -> None:
    plan(holdout_set=upload("holdout_set", [ADA]))
    made = submit(ADA)
    assert serve_deletions(parts) == 0
    assert "holdout row 1 is forget row 1" in http.get(f"{PLANS}/m").json()["status_reason"]
    assert show(http, made)["status"] == "approved"
    with parts.sessions.begin() as s:
        assert s.scalars(select(File.purged_at).where(File.created_by == "system")).one() is not None
    assert plan()["status_reason"] is None
    assert serve_deletions(parts) == 1


def test_plans_are_judged_shown_and_removed(
    http: TestClient, plan: Callable[..., dict[str, Any]], make_key: Callable[..., str], sessions: Sessions
) -> None:
    made = plan(window_seconds=60)
    assert (made["id"], made["window_seconds"], made["job"]["budget"]["max_steps"]) == ("m", 60, 300)
    file = made["job"]["retain_set"]
    body = {name: made[name] for name in ("job", "window_seconds", "requests_max")}
    assert http.put(f"{PLANS}/m", json=body).status_code == 200  # what was shown can be put
    problem(http.put(f"{PLANS}/nobody", json=body), 404, "not-found")
    for change, pointer in [
        ({"method": {"type": "magic"}}, "/job/method/type"),
        ({"retain_set": "ufile_" + "0" * 32}, "/job/retain_set"),
        ({"refusal_set": file}, "/job/refusal_set"),
        ({"forget_set": file}, "/job/forget_set"),
        ({"benchmarks": ["none"]}, "/job/benchmarks/0"),
    ]:
        found = problem(http.put(f"{PLANS}/m", json=body | {"job": body["job"] | change}), 422, "validation-error")
        assert found["errors"][0]["pointer"] == pointer
    problem(http.delete(f"/v1/files/{file}"), 409, "invalid-transition")
    problem(http.get(f"{PLANS}/m", headers=as_(make_key("admin", "other"))), 404, "not-found")
    problem(http.delete(f"{PLANS}/m", headers=as_(make_key("admin", "other"))), 404, "not-found")
    with pytest.raises(InvalidTransition, match="plan"), sessions.begin() as s:
        models.remove(s, "m")
    assert http.delete(f"{PLANS}/m").status_code == 204
    problem(http.get(f"{PLANS}/m"), 404, "not-found")


def ended_by(http: TestClient, worker: Desk, request: dict[str, Any], end: str) -> None:
    """Its job ends, and then so does it."""
    path = f"{REQUESTS}/{request['id']}"
    if end == "passed":
        worker.end()
    elif end == "closed":
        worker.end(FAILED)
        http.post(f"{path}/close", json={"reason": "r"})
    else:
        worker.fail() if end == "failed, cancelled" else worker.end(FAILED)
        http.post(f"{path}/cancel")


@pytest.mark.parametrize("end", ["passed", "closed", "failed, cancelled", "not passed, cancelled"])
def test_no_row_is_left_of_a_request_that_has_ended(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    worker: Desk,
    end: str,
) -> None:
    plan(requests_max=1)
    made = submit(ADA)
    assert made["files"] == [made["forget_set"]]
    assert serve_deletions(parts) == 1
    batch = the_job(http, made)["forget_set"]
    assert purge_due(parts.sessions, parts.storage) == 0
    ended_by(http, worker, made, end)
    assert show(http, made)["files"] == [made["forget_set"], batch]
    assert purge_due(parts.sessions, parts.storage) == 2
    for file in (made["forget_set"], batch):
        assert http.get(f"/v1/files/{file}").json()["purged_at"] is not None


def test_what_was_forgotten_is_kept_as_long_as_the_tenant_says(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    worker: Desk,
) -> None:
    with parts.sessions.begin() as s:
        s.execute(update(Tenant).values(keep_forgotten_days=30))
    plan()
    one, two = submit(ADA), submit(EVE)
    assert serve_deletions(parts) == 1
    batch = the_job(http, one)["forget_set"]
    worker.end()
    assert purge_due(parts.sessions, parts.storage) == 0
    for file in (one["forget_set"], two["forget_set"], batch):
        purge_at = datetime.fromisoformat(http.get(f"/v1/files/{file}").json()["purge_at"])
        assert timedelta(days=29) < purge_at - datetime.now(UTC) <= timedelta(days=30)
    with parts.sessions.begin() as s:
        s.execute(update(File).values(purge_at=File.purge_at - timedelta(days=30)))
    assert purge_due(parts.sessions, parts.storage) == 3


def test_rows_that_another_open_request_needs_stay_until_it_ends(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    worker: Desk,
) -> None:
    plan()
    one, two = submit(ADA), submit(EVE)
    assert serve_deletions(parts) == 1
    batch = the_job(http, one)["forget_set"]
    worker.fail()
    http.post(f"{REQUESTS}/{one['id']}/cancel")
    assert purge_due(parts.sessions, parts.storage) == 1  # its own
    assert http.get(f"/v1/files/{batch}").json()["purge_at"] is None
    http.post(f"{REQUESTS}/{two['id']}/close", json={"reason": "r"})
    assert purge_due(parts.sessions, parts.storage) == 2


def test_what_the_sweep_settles_is_settled_job_by_job(
    http: TestClient, submit: Callable[..., dict[str, Any]], worker: Desk, parts: Parts
) -> None:
    """With the locks of several jobs' requests at once, two could wait for each other."""
    requests = [submit(row) for row in (ADA, EVE)]
    for row, request in zip((ADA, EVE), requests, strict=True):
        http.post(JOBS, json=job_body([row], [request["id"]]))
    late = [worker.claim().job_id for _ in requests]
    with parts.sessions.begin() as s:
        for minutes, job in zip((2, 1), late, strict=True):
            s.execute(update(Job).where(Job.id == job).values(lease_until=func.now() - timedelta(minutes=minutes)))
    never = parts.settings.model_copy(update={"infra_losses_max": 0})
    with ThreadPoolExecutor(1) as pool:
        with parts.sessions.begin() as s:
            deletions.locked(s, requests[1]["id"])
            swept = pool.submit(sweep_once, parts.sessions, parts.dispatcher, never)
            until = time.monotonic() + 10
            while show(http, requests[0])["status"] != "failed" and time.monotonic() < until:
                time.sleep(0.02)
            assert [show(http, one)["status"] for one in requests] == ["failed", "in_progress"]
        assert swept.result().expired == 2
    assert show(http, requests[1])["status"] == "failed"


# --- deadlines


def test_what_is_overdue_is_noted_once_and_counted(
    http: TestClient, submit: Callable[..., dict[str, Any]], parts: Parts
) -> None:
    late, soon = submit(received_at="2026-01-31T00:00:00Z"), submit()
    submit(received_at="2026-01-31T00:00:00Z", regulation="ccpa")
    gone = submit(received_at="2025-01-31T00:00:00Z")
    http.post(f"{REQUESTS}/{gone['id']}/cancel")
    with parts.sessions.begin() as s:
        assert len(deletions.note_overdue(s)) == 2
    with parts.sessions.begin() as s:
        assert deletions.note_overdue(s) == []
    shown = show(http, late)
    assert (shown["overdue"], shown["due_in_seconds"] < 0, shown["version"]) == (True, True, late["version"] + 1)
    assert not show(http, soon)["overdue"]
    samples = {
        (sample.name, sample.labels.get("status"), sample.labels.get("regulation")): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    requests = "unlearn_deletion_requests"
    assert samples[requests, "approved", "gdpr"] == 2
    assert samples[requests, "approved", "ccpa"] == 1
    assert samples[requests, "cancelled", "gdpr"] == 1
    assert samples[requests, "denied", "other"] == 0
    assert samples["unlearn_deletion_requests_overdue", None, None] == 2
    first = datetime.fromisoformat(soon["due_at"]).timestamp()
    assert samples["unlearn_deletion_request_next_due_timestamp_seconds", None, None] == pytest.approx(first, abs=0.01)


def test_only_the_moves_of_the_table_are_made(submit: Callable[..., dict[str, Any]], sessions: Sessions) -> None:
    made = submit()
    verbs: dict[RequestStatus, Callable[[Session], DeletionRequest]] = {
        RequestStatus.DENIED: lambda s: deletions.deny(s, made["id"], Denial(reason=DenialReason.OTHER)),
        RequestStatus.CANCELLED: lambda s: deletions.cancel(s, made["id"]),
    }
    for before in RequestStatus:
        for target, verb in verbs.items():
            with sessions() as s:  # rolled back
                s.execute(update(DeletionRequest).values(status=before))
                if target in TRANSITIONS[before]:
                    assert verb(s).status == target
                elif target != before or target is RequestStatus.DENIED:
                    with pytest.raises(InvalidTransition):
                        verb(s)
