"""What becomes of the requests of a job that failed: on rows of some of them, or for another reason."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from service.api.deps import Parts
from service.batches import serve_deletions
from service.domain.deletion import RequestStatus
from service.domain.job import FailureCode, ModelEntry, PromptFormat
from service.store import deletions, models
from service.store.session import Sessions
from service.store.tables import AuditEvent, DeletionRequest, WebhookMessage
from tests.service import deleting, test_deletion_plans
from tests.service.deleting import ADA, BOB, EVE, FAILED, JOBS, REQUESTS, Desk, as_, job_body, problem, show

parts = deleting.parts
plan = test_deletion_plans.plan
submit = deleting.submit
worker = deleting.worker

Submit = Callable[..., dict[str, Any]]
TOO_LONG = FailureCode.ROW_TOO_LONG


def requeue(http: TestClient, request: dict[str, Any], **headers: str) -> Any:
    return http.post(f"{REQUESTS}/{request['id']}/requeue", headers=headers)


def jobs_of(http: TestClient, request: dict[str, Any]) -> list[str]:
    return [job["id"] for job in show(http, request)["jobs"]]


def told(sessions: Sessions, request: dict[str, Any]) -> list[tuple[str, str]]:
    """Who did what, in the audit log."""
    with sessions.begin() as s:
        events = select(AuditEvent).where(AuditEvent.object_id == request["id"]).order_by(AuditEvent.seq)
        return [(event.action.removeprefix("deletion_request."), event.actor) for event in s.scalars(events)]


def test_one_requests_row_fails_that_request_alone(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, worker: Desk
) -> None:
    plan(requests_max=3)
    ada, eve, third = submit(ADA), submit(BOB | {"answer": "A painter."}, EVE), submit({"text": "third"})
    assert serve_deletions(parts) == 1
    failed = worker.fail(TOO_LONG, forget_rows=[3])
    assert http.get(f"{JOBS}/{failed}").json()["failure"]["forget_rows"] == [3]
    shown = show(http, eve)
    why = f"job {failed} on model 'm' failed: row_too_long, on"
    assert (shown["status"], shown["status_reason"]) == ("failed", f"{why} row 2 of this request")
    for unaffected in (ada, third):
        shown = show(http, unaffected)
        assert shown["status"] == "approved"
        assert shown["status_reason"] == f"waits for another job: {why} rows that are not this request's"
    assert serve_deletions(parts) == 1
    [_, again] = jobs_of(http, ada)
    assert http.get(f"{JOBS}/{again}").json()["deletion_requests"] == [ada["id"], third["id"]]
    assert (show(http, ada)["status"], show(http, ada)["status_reason"]) == ("in_progress", None)
    worker.end()
    assert [show(http, one)["status"] for one in (ada, eve, third)] == ["completed", "failed", "completed"]
    assert serve_deletions(parts) == 0, "the one with the wrong row is not tried again by itself"


def test_who_listens_to_webhooks_is_told_of_each(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, worker: Desk
) -> None:
    plan()
    ada, eve = submit(ADA), submit(EVE)
    assert serve_deletions(parts) == 1
    types = ["deletion_request.failed", "deletion_request.requeued"]
    http.post("/v1/webhook-endpoints", json={"url": "https://93.184.215.14/", "event_types": types})
    worker.fail(TOO_LONG, forget_rows=[1])
    requeue(http, ada)
    with parts.sessions.begin() as s:
        bodies = [json.loads(body) for body in s.scalars(select(WebhookMessage.body).order_by(WebhookMessage.id))]
    sent = [(body["data"]["id"], body["type"].partition(".")[2], body["data"]["status"]) for body in bodies]
    assert sorted(sent[:2]) == sorted([(ada["id"], "failed", "failed"), (eve["id"], "requeued", "approved")])
    assert sent[2:] == [(ada["id"], "requeued", "approved")]


def test_a_row_of_two_requests_fails_both(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, worker: Desk
) -> None:
    plan(requests_max=3)
    one, two, unaffected = submit(ADA, EVE), submit(EVE, ADA, {"text": "third"}, EVE), submit({"text": "fourth"})
    assert serve_deletions(parts) == 1
    worker.fail(TOO_LONG, forget_rows=[2, 3])
    assert [show(http, each)["status"] for each in (one, two, unaffected)] == ["failed", "failed", "approved"]
    assert show(http, one)["status_reason"].endswith("on row 2 of this request")
    assert show(http, two)["status_reason"].endswith("on rows 1, 3 of this request"), "in the order of its own set"


def test_a_request_that_was_let_go_and_that_no_job_can_serve_any_more_fails(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, worker: Desk, upload: Callable[..., str]
) -> None:
    plan()
    ada, eve = submit(ADA), submit(EVE)
    assert serve_deletions(parts) == 1
    worker.fail(TOO_LONG, forget_rows=[1])
    plan(retain_set=upload("retain_set", [EVE]))
    assert serve_deletions(parts) == 0
    assert [show(http, one)["status"] for one in (ada, eve)] == ["failed", "failed"]
    assert show(http, eve)["status_reason"] == "model 'm': its row 1 is row 1 of the plan's retain set"


def test_a_job_that_fails_on_no_single_row_fails_all(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, worker: Desk
) -> None:
    plan()
    both = submit(ADA), submit(EVE)
    assert serve_deletions(parts) == 1
    worker.fail()
    assert [show(http, one)["status"] for one in both] == ["failed", "failed"]


def test_a_job_that_is_tried_again_serves_those_that_were_let_go_too(
    http: TestClient, submit: Submit, worker: Desk
) -> None:
    ada, eve = submit(ADA), submit(EVE)
    assert http.post(JOBS, json=job_body([ADA, EVE], [ada["id"], eve["id"]])).status_code == 201
    failed = worker.fail(TOO_LONG, forget_rows=[1])
    assert [show(http, one)["status"] for one in (ada, eve)] == ["failed", "approved"]
    assert http.post(f"{JOBS}/{failed}/retry").status_code == 202
    assert [show(http, one)["status"] for one in (ada, eve)] == ["in_progress", "in_progress"]
    refused = http.post(JOBS, json=job_body([EVE], [eve["id"]]))
    assert "already" in problem(refused, 422, "validation-error")["detail"]
    worker.end()
    assert [show(http, one)["status"] for one in (ada, eve)] == ["completed", "completed"]


def test_what_another_model_waits_for_changes_nothing_of_what_failed(
    http: TestClient, submit: Submit, worker: Desk, sessions: Sessions
) -> None:
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="n", source="path", location="n", prompt_format=PromptFormat()))
    ada, eve = submit(ADA, models=["m", "n"]), submit(EVE, models=["m"])
    http.post(JOBS, json=job_body([ADA], [ada["id"]], model="n"))
    bad = worker.end(FAILED)
    http.post(JOBS, json=job_body([ADA, EVE], [ada["id"], eve["id"]]))
    requeued = worker.fail(TOO_LONG, forget_rows=[2])
    shown = show(http, ada)
    assert (shown["status"], shown["status_reason"]) == ("failed", f"job {bad} on model 'n': the verdict is FAILED")
    assert requeue(http, ada).json()["status"] == "approved"
    http.post(JOBS, json=job_body([ADA], [ada["id"]], model="n"))
    worker.end()
    shown = show(http, ada)
    assert shown["status"] == "in_progress"
    assert shown["status_reason"].startswith(f"waits for another job: job {requeued} on model 'm' failed")


def test_a_request_that_failed_is_requeued_once_and_its_plan_serves_it(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, worker: Desk, make_key: Callable[..., str]
) -> None:
    plan(requests_max=1)
    made = submit(ADA)
    problem(requeue(http, made, **as_(make_key("compliance_submitter"))), 403, "insufficient-scope")
    waits = requeue(http, made)
    assert (waits.status_code, waits.json()["version"]) == (200, made["version"]), "it waits already"
    assert serve_deletions(parts) == 1
    assert "in_progress" in problem(requeue(http, made), 409, "invalid-transition")["detail"]
    failed = worker.end(FAILED)
    tag = http.get(f"{REQUESTS}/{made['id']}").headers["etag"]
    problem(requeue(http, made, **{"If-Match": '"1"'}), 412, "precondition-failed")
    again = requeue(http, made, **{"If-Match": tag})
    reason = f"waits for another job: job {failed} on model 'm': the verdict is FAILED"
    assert (again.json()["status"], again.json()["status_reason"]) == ("approved", reason)
    assert again.headers["etag"] != tag
    assert requeue(http, made).json()["version"] == again.json()["version"]
    assert serve_deletions(parts) == 1
    assert jobs_of(http, made)[0] == failed
    worker.end()
    assert show(http, made)["status"] == "completed"
    assert "completed" in problem(requeue(http, made), 409, "invalid-transition")["detail"]
    actor = made["created_by"]
    moves = [("received", actor), ("approved", actor), ("in_progress", "system"), ("failed", "system")]
    moves += [("requeued", actor), ("in_progress", "system"), ("completed", "system")]
    assert told(parts.sessions, made) == moves


def test_what_no_job_could_serve_is_tried_again_when_it_is_requeued(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts
) -> None:
    plan(requests_max=1)
    bob = submit(BOB)
    for _ in range(2):
        assert serve_deletions(parts) == 0
        assert show(http, bob)["status_reason"] == "model 'm': its row 1 is row 1 of the plan's retain set"
        shown = requeue(http, bob).json()
        assert (shown["status"], shown["status_reason"]) == ("approved", None)


def test_what_has_passed_for_one_model_is_served_again_for_the_other_alone(
    http: TestClient, submit: Submit, plan: Submit, worker: Desk, parts: Parts
) -> None:
    with parts.sessions.begin() as s:
        models.add(s, ModelEntry(name="n", source="path", location="n", prompt_format=PromptFormat()))
    plan(requests_max=1)
    made = submit(ADA, models=["m", "n"])
    assert serve_deletions(parts) == 1
    worker.end()
    http.post(JOBS, json=job_body([ADA], [made["id"]], model="n"))
    worker.fail()
    assert show(http, made)["status"] == "failed"
    assert requeue(http, made).json()["status"] == "in_progress"
    assert ("requeued", made["created_by"]) in told(parts.sessions, made)
    assert serve_deletions(parts) == 0
    http.post(JOBS, json=job_body([ADA], [made["id"]], model="n"))
    worker.end()
    assert show(http, made)["status"] == "completed"


@pytest.mark.parametrize("status", sorted(set(RequestStatus) - {RequestStatus.APPROVED, RequestStatus.FAILED}))
def test_only_what_failed_is_requeued(
    http: TestClient, submit: Submit, sessions: Sessions, status: RequestStatus
) -> None:
    made = submit(ADA)
    with sessions.begin() as s:
        deletions.write(s, s.get_one(DeletionRequest, made["id"]), status=status)
    assert status in problem(requeue(http, made), 409, "invalid-transition")["detail"]
