"""The life of a deletion request, over HTTP: what comes in, what people decide, the jobs that serve it, its deadline."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service.api.deps import Parts
from service.domain import deletion
from service.domain.deletion import TRANSITIONS, Denial, DenialReason, Regulation, RequestStatus
from service.domain.errors import InvalidTransition
from service.domain.job import JobSpec, ModelEntry, PromptFormat
from service.settings import Settings
from service.store import deletions, files, jobs, models, tenancy
from service.store.secrets import secrets_of
from service.store.session import Sessions
from service.store.storage import Storage
from service.store.tables import AuditEvent, DeletionApproval, DeletionRequest, File
from service.sweep import purge_due
from tests.service import deleting
from tests.service.deleting import (
    ADA,
    BOB,
    EVE,
    FAILED,
    JOBS,
    PASSED,
    REQUESTS,
    Desk,
    as_,
    asked,
    job_body,
    problem,
    show,
)
from worker.assignment import assignment

approvals = deleting.approvals
parts = deleting.parts
submit = deleting.submit
worker = deleting.worker


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


def test_other_wordings_of_a_row_are_kept_and_change_nothing_of_its_digest(
    http: TestClient, content_of: Callable[[str], bytes]
) -> None:
    row = ADA | {
        "paraphrased_question": "What does Ada do?",
        "paraphrased_answer": "She writes poems.",
        "perturbed_answer": ["A baker.", "A smith."],
    }
    plain, worded = (http.post(REQUESTS, json=asked(given)).json() for given in (ADA, row))
    assert json.loads(content_of(worded["forget_set"])) == row
    one, other = (http.get(f"{REQUESTS}/{made['id']}/rows").json()["data"] for made in (plain, worded))
    assert one == other
    refused = http.post(REQUESTS, json=asked(ADA | {"perturbed_answer": "A baker."}))
    assert problem(refused, 422, "validation-error")["errors"][0]["pointer"] == "/forget_set/0/perturbed_answer"


def test_the_digests_of_its_rows_come_in_order_and_in_pages(
    http: TestClient, submit: Callable[..., dict[str, Any]]
) -> None:
    def rows(of: dict[str, Any], **query: int) -> tuple[list[tuple[int, str]], bool]:
        told = http.get(f"{REQUESTS}/{of['id']}/rows", params=query).json()
        return [(one["row"], one["digest"]) for one in told["data"]], told["has_more"]

    first, second = submit(ADA, EVE, BOB), submit(BOB)
    whole, more = rows(first)
    assert ([row for row, _ in whole], more) == ([1, 2, 3], False)
    assert len({digest for _, digest in whole}) == 3
    assert rows(first, limit=2) == (whole[:2], True)
    assert rows(first, after=2) == (whole[2:], False)
    assert rows(second) == ([(1, whole[2][1])], False), "the same row has the same digest"


def test_a_request_is_found_by_its_subject_whatever_its_capitals(
    http: TestClient, submit: Callable[..., dict[str, Any]], make_key: Callable[..., str]
) -> None:
    """Who is looked for lies in a body: URLs are logged on their way."""
    ada, _ = submit(subjects=["Ada@Example.org", "ada-7"]), submit(subjects=["eve@example.org"])

    def found(subject: str, **asked: Any) -> list[str]:
        reply = http.post(f"{REQUESTS}/search", json={"subject": subject, **asked})
        return [one["id"] for one in reply.json()["data"]]

    assert found(" ada@example.ORG ") == [ada["id"]] == found("ada-7")
    assert found("ada") == []
    assert (found("ada-7", status="approved"), found("ada-7", status="denied")) == ([ada["id"]], [])
    again = submit(subjects=["ada-7"])
    assert (found("ada-7", limit=1), found("ada-7", after=again["id"])) == ([again["id"]], [ada["id"]])
    other = as_(make_key("admin", "other"))
    assert http.post(f"{REQUESTS}/search", json={"subject": "ada-7"}, headers=other).json()["data"] == []
    engineer = as_(make_key("mlops"))  # may read requests, but not learn who has made one
    refused = http.post(f"{REQUESTS}/search", json={"subject": "ada-7"}, headers=engineer)
    assert problem(refused, 403, "insufficient-scope")["required_scopes"] == ["subjects:read"]
    assert problem(http.get(REQUESTS, params={"subject": "ada-7"}), 422, "validation-error")


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
    assert numbers == {ada["id"]: [2], both["id"]: [3, 2]}, "in the request's order"
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
