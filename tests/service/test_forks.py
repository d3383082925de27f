"""Jobs for deletion requests on one model are one line: none starts from less than the model has forgotten."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.domain.errors import InvalidTransition
from service.domain.job import ModelEntry, PromptFormat
from service.store import lineage, models, tenancy
from service.store.session import Sessions
from tests.service import deleting
from tests.service.deleting import ADA, EVE, FAILED, JOBS, REQUESTS, Desk, job_body, problem, show

Submit = Callable[..., dict[str, Any]]
Serve = Callable[..., Any]

parts = deleting.parts
submit = deleting.submit
worker = deleting.worker


@pytest.fixture
def serve(http: TestClient, submit: Submit) -> Serve:
    """serve(row, **fields of the job) -> the answer to a job for a new request of that row."""
    return lambda row, **fields: http.post(JOBS, json=job_body([row], [submit(row)["id"]], **fields))


def test_a_failed_job_is_not_tried_again_once_its_model_has_forgotten_for_others(
    http: TestClient, submit: Submit, serve: Serve, worker: Desk
) -> None:
    request = submit(ADA)
    assert http.post(JOBS, json=job_body([ADA], [request["id"]])).status_code == 201
    failed = worker.fail()
    assert serve(EVE).status_code == 201
    last = worker.end()
    refused = problem(http.post(f"{JOBS}/{failed}/retry"), 409, "invalid-transition")
    assert last in refused["detail"], "where another job would have to start"
    assert http.get(f"{JOBS}/{failed}").json()["status"] == "failed"
    assert http.post(JOBS, json=job_body([ADA], [request["id"]], parent=last)).status_code == 201
    again = worker.fail()
    assert http.post(f"{JOBS}/{again}/retry").status_code == 202, "its parent is still the last of the line"
    worker.end()
    assert show(http, request)["status"] == "completed"


@pytest.mark.parametrize("end", ["cancelled", "completed"])
def test_a_failed_job_is_not_tried_again_for_a_request_that_was_closed(
    http: TestClient, submit: Submit, worker: Desk, end: str
) -> None:
    """As it could not be made anew for it: whoever took it back wants nothing forgotten."""
    kept, closed = submit(ADA), submit(EVE)
    assert http.post(JOBS, json=job_body([ADA, EVE], [kept["id"], closed["id"]])).status_code == 201
    failed = worker.fail()
    path = f"{REQUESTS}/{closed['id']}"
    ended = http.post(f"{path}/cancel") if end == "cancelled" else http.post(f"{path}/close", json={"reason": "r"})
    assert ended.json()["status"] == end
    refused = problem(http.post(f"{JOBS}/{failed}/retry"), 409, "invalid-transition")
    assert refused["detail"].startswith(f"request {closed['id']} is {end}")
    assert [show(http, one)["status"] for one in (kept, closed)] == ["failed", end]
    assert http.post(JOBS, json=job_body([ADA], [kept["id"]])).status_code == 201


def test_a_model_that_forgot_for_requests_keeps_its_name(
    http: TestClient, serve: Serve, worker: Desk, sessions: Sessions
) -> None:
    """Other weights under it would be taken for those from which the next job goes on."""
    entry = ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat())
    assert http.post(JOBS, json=job_body([EVE], [])).status_code == 201
    worker.end()
    assert serve(ADA).status_code == 201
    worker.end(FAILED)
    with sessions.begin() as s:
        models.remove(s, "m")
        models.add(s, entry)
    assert serve(EVE).status_code == 201, "nothing was forgotten for a request before"
    last = worker.end()
    with sessions.begin() as s:
        tenancy.bind(s, "another", "tester")
        with pytest.raises(InvalidTransition, match=f"{last} forgot: it stays; register other weights under another"):
            models.remove(s, "m")


def test_a_verdict_that_is_not_passed_ends_no_line(http: TestClient, serve: Serve, worker: Desk) -> None:
    assert serve(ADA).status_code == 201
    failed = worker.fail()
    assert serve(EVE).status_code == 201
    worker.end(FAILED)
    assert http.post(f"{JOBS}/{failed}/retry").status_code == 202


def test_a_job_that_forgets_anew_what_those_before_it_forgot_can_start_from_the_base(
    http: TestClient, submit: Submit, serve: Serve, worker: Desk
) -> None:
    """Not from their rows alone: also from those that an earlier such job took over, whose requests it did not serve."""
    third, fourth = dict(ADA, answer="3"), dict(ADA, answer="4")
    assert serve(ADA).status_code == 201
    first = worker.end()
    assert serve(EVE, parent=first).status_code == 201
    worker.end()

    def ask(row: dict[str, str], *others: dict[str, str], **fields: Any) -> Any:
        return http.post(JOBS, json=job_body([row, *others], [submit(row)["id"]], **fields))

    [wrong] = problem(ask(third, ADA), 422, "validation-error")["errors"]
    assert (wrong["pointer"], wrong["code"]) == ("/parent", "fork")
    anew = ask(third, EVE, ADA)
    assert (anew.status_code, anew.json()["parent"]) == (201, None)
    consolidated = worker.end()
    assert ask(fourth, third, EVE, ADA).status_code == 201
    worker.end(FAILED)
    [wrong] = problem(ask(fourth, third), 422, "validation-error")["errors"]
    assert (wrong["code"], consolidated in wrong["detail"]) == ("fork", True)
    assert ask(fourth, third, EVE, parent=first).status_code == 201, "what the first forgot, it has from there"
    worker.end(FAILED)
    assert ask(fourth, parent=consolidated).status_code == 201


def test_no_two_jobs_for_requests_run_on_one_model(
    http: TestClient, serve: Serve, worker: Desk, sessions: Sessions
) -> None:
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="n", source="path", location="n", prompt_format=PromptFormat()))
    assert serve(ADA).status_code == 201
    failed = worker.fail()
    under_way = serve(EVE).json()["id"]
    refused = problem(http.post(f"{JOBS}/{failed}/retry"), 409, "invalid-transition")
    assert under_way in refused["detail"]
    [wrong] = problem(serve(dict(ADA, answer="2")), 422, "validation-error")["errors"]
    assert (wrong["pointer"], wrong["code"], under_way in wrong["detail"]) == ("/parent", "fork", True)
    other = job_body([EVE], [], model="n")
    assert http.post(JOBS, json=other).status_code == 201
    assert http.post(JOBS, json=other | {"model": "m"}).status_code == 201, "it serves none"


def test_of_a_retry_and_a_new_job_at_once_one_is_made(
    http: TestClient, serve: Serve, worker: Desk, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen that nothing is under way; the model's row lets one go first, and the other look again."""
    assert serve(ADA).status_code == 201
    failed = worker.fail()
    both, lengthen = Barrier(2), lineage.lengthen

    def together(*given: Any) -> None:
        both.wait(10)
        lengthen(*given)

    monkeypatch.setattr(lineage, "lengthen", together)
    with ThreadPoolExecutor(2) as pool:
        retried = pool.submit(http.post, f"{JOBS}/{failed}/retry")
        made = pool.submit(serve, EVE)
        replies = [retried.result(), made.result()]
    assert sorted(reply.status_code // 100 for reply in replies) == [2, 4]
    refused = next(reply for reply in replies if reply.status_code >= 400)
    assert "is queued" in problem(refused, 409, "invalid-transition")["detail"]
