"""Rows of a retain set that somebody wants forgotten, or that the model was made to forget before."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient

from service.api import retained
from service.api.deps import Parts
from service.batches import serve_deletions
from service.domain.job import ModelEntry, PromptFormat
from service.store import files, models
from service.store.tables import File, Job
from service.sweep import purge_due
from tests.service import deleting, test_deletion_plans
from tests.service.deleting import ADA, BOB, EVE, JOBS, PLANS, REQUESTS, Desk, as_, asked, job_body, problem, show

approvals = deleting.approvals
parts = deleting.parts
plan = test_deletion_plans.plan
submit = deleting.submit
worker = deleting.worker

Submit = Callable[..., dict[str, Any]]
OTHER = {"text": "other"}


def errors(reply: Any) -> list[tuple[str, str, str]]:
    found = problem(reply, 422, "validation-error")["errors"]
    return [(error["pointer"], error["detail"], error["code"]) for error in found]


# --- requests and their models' plans


def test_a_request_for_rows_that_a_plan_retains_is_warned(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, upload: Callable[..., str]
) -> None:
    with parts.sessions.begin() as s:
        models.add(s, ModelEntry(name="n", source="path", location="n", prompt_format=PromptFormat()))
    assert submit(BOB)["warnings"] == [], "there is no plan yet"
    plan(retain_set=upload("retain_set", [OTHER, BOB, EVE]))
    assert submit(ADA)["warnings"] == []
    assert submit(BOB, models=["n"])["warnings"] == []
    padded = BOB | {"answer": f" {BOB['answer']}"}
    made = submit(ADA, EVE, padded, models=["m", "n"])
    [warning] = made["warnings"]
    assert warning["code"] == "row_retained"
    assert "model 'm' retains: 2 (forget = retain): 2 = 3, 3 = 2;" in warning["message"]
    assert show(http, made)["warnings"] == made["warnings"], "it is kept"


def test_the_requests_of_a_batch_are_warned_each(
    http: TestClient, plan: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[str]()
    content = retained.files.content

    def counted(*arguments: Any) -> Any:
        opened.append("")
        return content(*arguments)

    plan()
    monkeypatch.setattr(retained.files, "content", counted)
    results = http.post(f"{REQUESTS}/batch", json={"requests": [asked(BOB), asked(ADA), asked(ADA, BOB)]}).json()
    assert [len(one["object"]["warnings"]) for one in results["results"]] == [1, 0, 1]
    assert len(opened) == 1, "the retain set is read once"


def test_a_large_retain_set_is_looked_at_only_when_a_job_is_made(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(requests_max=1)
    monkeypatch.setattr(retained, "JUDGED_BYTES", 10)
    made = submit(BOB)
    assert made["warnings"] == []
    assert serve_deletions(parts) == 0
    assert show(http, made)["status_reason"] == "model 'm': its row 1 is row 1 of the plan's retain set"


# --- rows that are left out of a plan's retain set


@pytest.fixture
def rows_of(parts: Parts) -> Callable[[str], list[Any]]:
    def read(file_id: str) -> list[Any]:
        with parts.sessions.begin() as s:
            file = files.get(s, file_id)
        with files.content(parts.storage, parts.secrets, file) as content:
            return [json.loads(line) for line in content]

    return read


def job_of(http: TestClient, request: dict[str, Any]) -> dict[str, Any]:
    return dict(http.get(f"{JOBS}/{show(http, request)['jobs'][-1]['id']}").json())


def test_who_approves_a_request_has_its_rows_left_out_of_what_its_plan_retains(
    http: TestClient,
    submit: Submit,
    plan: Submit,
    parts: Parts,
    worker: Desk,
    upload: Callable[..., str],
    approvals: Callable[[int], None],
    make_key: Callable[..., str],
    rows_of: Callable[[str], list[Any]],
) -> None:
    padded = BOB | {"answer": f" {BOB['answer']}"}
    made = plan(requests_max=1, retain_set=upload("retain_set", [OTHER, padded, BOB, EVE]))
    approvals(1)
    bob, other = submit(BOB), as_(make_key("compliance_approver"))
    path = f"{REQUESTS}/{bob['id']}/approve?leave_out_retained=true"
    problem(http.post(path), 409, "invalid-transition")  # by who submitted it
    assert show(http, bob)["leave_out_retained"] is False
    approved = http.post(path, headers=other).json()
    assert (approved["status"], approved["leave_out_retained"]) == ("approved", True)
    assert serve_deletions(parts) == 1
    job = job_of(http, bob)
    assert rows_of(job["retain_set"]) == [OTHER, EVE]
    assert rows_of(made["job"]["retain_set"]) == [OTHER, padded, BOB, EVE], "the plan's own is as it was"
    problem(http.post(f"{REQUESTS}/{bob['id']}/requeue?leave_out_retained=true"), 409, "invalid-transition")
    worker.end()
    assert show(http, bob)["status"] == "completed"
    assert purge_due(parts.sessions, parts.storage) == 3, "the request's set, and those that were made for its job"

    approvals(0)
    as_prompt = {"prompt": BOB["question"], "completion": f"{BOB['answer']} "}
    plan(requests_max=1, retain_set=upload("retain_set", [BOB, OTHER, padded, as_prompt]))
    ada = submit(ADA)
    assert serve_deletions(parts) == 1
    later = job_of(http, ada)
    assert (later["parent"], rows_of(later["retain_set"])) == (job["id"], [OTHER]), "or the model would learn it again"


def test_a_request_that_failed_for_a_row_that_is_retained_is_requeued_without_it(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, upload: Callable[..., str], worker: Desk
) -> None:
    retain_set = upload("retain_set", [OTHER, BOB])
    plan(requests_max=1, retain_set=retain_set)
    bob = submit(BOB)
    assert serve_deletions(parts) == 0
    assert show(http, bob)["status"] == "failed"
    assert http.post(f"{REQUESTS}/{bob['id']}/requeue?leave_out_retained=true").json()["status"] == "approved"
    assert serve_deletions(parts) == 1
    assert job_of(http, bob)["retain_set"] != retain_set
    problem(http.post(f"{REQUESTS}/{bob['id']}/cancel"), 409, "invalid-transition")


def test_who_submitted_a_request_that_wants_approval_does_not_leave_its_rows_out_by_requeuing_it(
    http: TestClient,
    submit: Submit,
    plan: Submit,
    parts: Parts,
    approvals: Callable[[int], None],
    make_key: Callable[..., str],
) -> None:
    plan(requests_max=1)
    approvals(1)
    bob, other = submit(BOB), as_(make_key("compliance_approver"))
    path = f"{REQUESTS}/{bob['id']}/requeue"
    problem(http.post(f"{path}?leave_out_retained=true"), 409, "invalid-transition")
    assert http.post(f"{REQUESTS}/{bob['id']}/approve", headers=other).json()["status"] == "approved"
    problem(http.post(f"{path}?leave_out_retained=true"), 409, "invalid-transition")
    assert serve_deletions(parts) == 0
    problem(http.post(f"{path}?leave_out_retained=true"), 409, "invalid-transition")
    assert (show(http, bob)["status"], show(http, bob)["leave_out_retained"]) == ("failed", False)
    assert http.post(path).json()["status"] == "approved", "to be tried again as it is"
    assert http.post(f"{path}?leave_out_retained=true", headers=other).json()["leave_out_retained"] is True


def test_a_plan_whose_set_has_none_of_the_rows_is_used_as_it_is(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts
) -> None:
    made = plan(requests_max=1)
    ada = submit(ADA)
    http.post(f"{REQUESTS}/{ada['id']}/requeue?leave_out_retained=true")
    assert serve_deletions(parts) == 1
    assert job_of(http, ada)["retain_set"] == made["job"]["retain_set"]


def leave_out(http: TestClient, request: dict[str, Any]) -> None:
    path = f"{REQUESTS}/{request['id']}/requeue?leave_out_retained=true"
    assert http.post(path).json()["leave_out_retained"] is True


def test_a_request_that_leaves_nothing_to_retain_fails_alone(
    http: TestClient,
    submit: Submit,
    plan: Submit,
    parts: Parts,
    worker: Desk,
    upload: Callable[..., str],
    rows_of: Callable[[str], list[Any]],
) -> None:
    plan(requests_max=3, retain_set=upload("retain_set", [OTHER, BOB]))
    bob, both, ada = submit(BOB), submit(BOB, OTHER), submit(ADA)
    for request in (bob, both):
        leave_out(http, request)
    assert serve_deletions(parts) == 1
    job = job_of(http, ada)
    assert (job["deletion_requests"], rows_of(job["retain_set"])) == ([bob["id"], ada["id"]], [OTHER])
    shown = show(http, both)
    assert (shown["status"], shown["jobs"]) == ("failed", [])
    assert "the plan's retain set would be empty" in shown["status_reason"]
    assert http.get(f"{PLANS}/m").json()["status_reason"] is None, "it goes on"
    worker.end()
    later = [submit({"text": text}) for text in ("third", "fourth", "fifth")]
    assert serve_deletions(parts) == 1
    assert rows_of(job_of(http, later[0])["retain_set"]) == [OTHER], "the one that failed does not keep others from it"


def test_a_request_that_waits_and_leaves_nothing_to_retain_does_not_stop_those_before(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts
) -> None:
    plan(requests_max=1)
    ada, bob = submit(ADA), submit(BOB)
    leave_out(http, bob)
    assert serve_deletions(parts) == 1
    assert show(http, ada)["status"] == "in_progress"


def test_what_is_left_out_for_one_request_another_may_want_forgotten(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, upload: Callable[..., str]
) -> None:
    plan(requests_max=3, retain_set=upload("retain_set", [OTHER, BOB, EVE]))
    bob, too, eve = submit(BOB), submit(ADA, BOB), submit(BOB, EVE)
    leave_out(http, bob)
    assert submit(BOB)["warnings"] == []
    assert "forget = retain): 2 = 3;" in submit(BOB, EVE)["warnings"][0]["message"]
    assert serve_deletions(parts) == 1
    assert job_of(http, bob)["deletion_requests"] == [bob["id"], too["id"]]
    assert show(http, eve)["status_reason"] == "model 'm': its row 2 is row 3 of the plan's retain set"


# --- what a chain of jobs has forgotten


def test_a_row_that_a_parent_forgot_is_not_retained(
    http: TestClient, submit: Submit, parts: Parts, worker: Desk
) -> None:
    first = submit(ADA)
    http.post(JOBS, json=job_body([OTHER, ADA], [first["id"]]))
    parent = worker.end()
    padded = ADA | {"answer": f"{ADA['answer']} "}
    asked = job_body([EVE], [submit(EVE)["id"]], parent=parent, retain_set=[BOB, OTHER, padded])
    fault = f"retain row {{}} was forgotten by job {parent}"
    assert errors(http.post(JOBS, json=asked)) == [
        ("/retain_set", fault.format(number), "overlap") for number in (2, 3)
    ]
    with parts.sessions.begin() as s:
        of_job = select(Job.forget_set).where(Job.id == parent)
        s.execute(update(File).where(File.id == of_job.scalar_subquery()).values(purge_at=File.created_at))
    assert purge_due(parts.sessions, parts.storage) == 2
    refused = errors(http.post(JOBS, json=asked))
    assert refused == [("/retain_set", fault.format(3), "overlap")], "by the digest that is kept of a request's row"
    assert http.post(JOBS, json=asked | {"retain_set": [BOB]}).status_code == 201
    second = worker.end()
    third = job_body([{"text": "third"}], [], parent=second, retain_set=[ADA, EVE])
    wrong = [(ADA, parent), (EVE, second)]
    assert [detail for _, detail, _ in errors(http.post(JOBS, json=third))] == [
        f"retain row {number} was forgotten by job {job}" for number, (_, job) in enumerate(wrong, start=1)
    ]


def test_of_what_was_forgotten_only_rows_that_are_no_requests_are_read(
    http: TestClient, submit: Submit, worker: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, content = list[str](), retained.files.content

    def noted(storage: Any, secrets: Any, file: File) -> Any:
        opened.append(file.id)
        return content(storage, secrets, file)

    http.post(JOBS, json=job_body([ADA], [submit(ADA)["id"]]))
    first = worker.end()
    made = http.post(JOBS, json=job_body([BOB, OTHER], [submit(BOB)["id"]], parent=first, retain_set=[EVE])).json()
    second = worker.end()
    monkeypatch.setattr(retained.files, "content", noted)
    third = job_body([{"text": "third"}], [], parent=second, retain_set=[ADA, BOB, OTHER])
    wrong = [(1, first), (2, second), (3, second)]
    assert [detail for _, detail, _ in errors(http.post(JOBS, json=third))] == [
        f"retain row {number} was forgotten by job {job}" for number, job in wrong
    ]
    assert opened == [made["forget_set"]]


def test_without_a_parent_the_base_model_may_retain_what_an_adapter_forgot(http: TestClient, worker: Desk) -> None:
    http.post(JOBS, json=job_body([ADA], []))
    worker.end()
    assert http.post(JOBS, json=job_body([EVE], [], retain_set=[ADA])).status_code == 201


def test_a_plan_does_not_retain_what_its_model_has_forgotten(
    http: TestClient, submit: Submit, plan: Submit, parts: Parts, worker: Desk, upload: Callable[..., str]
) -> None:
    made = plan(requests_max=1)
    submit(ADA)
    assert serve_deletions(parts) == 1
    job = worker.end()
    body = {name: made[name] for name in ("job", "window_seconds", "requests_max")}
    body["job"] = body["job"] | {"retain_set": upload("retain_set", [BOB, ADA])}
    fault = f"retain row 2 was forgotten by job {job}"
    assert errors(http.put(f"{PLANS}/m", json=body)) == [("/job/retain_set", fault, "overlap")]
