"""The jobs that the service makes for requests, by the plan of their model; and what is left of their rows."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import undefer
from starlette.testclient import TestClient

from service import batches
from service.api.deps import Parts
from service.batches import serve_deletions
from service.domain.errors import InvalidTransition
from service.domain.identity import Principal
from service.domain.job import ModelEntry, PromptFormat
from service.store import deletion_plans, deletions, files, lineage, models
from service.store.secrets import Secrets
from service.store.session import Sessions
from service.store.tables import DeletionPlan, DeletionRequest, File, Job, Tenant
from service.sweep import purge_due, serve_requests, sweep_once
from tests.service import deleting
from tests.service.conftest import Bell
from tests.service.deleting import ADA, BOB, EVE, FAILED, JOBS, PLANS, REQUESTS, Desk, as_, job_body, problem, show

parts = deleting.parts
submit = deleting.submit
worker = deleting.worker


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
    assert numbers == {ada["id"]: [1], eve["id"]: [2, 1]}
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


def test_a_plan_says_what_its_requests_wait_for(
    http: TestClient,
    submit: Callable[..., dict[str, Any]],
    plan: Callable[..., dict[str, Any]],
    parts: Parts,
    worker: Desk,
) -> None:
    def told() -> Any:
        return http.get(f"{PLANS}/m").json()["status_reason"]

    assert plan(window_seconds=3600)["status_reason"] is None
    first = submit(ADA)
    assert told() is None, "for others, as the plan says"
    plan()
    assert serve_deletions(parts) == 1
    assert told() is None
    job, late = the_job(http, first)["id"], submit(EVE)
    for verb, status in (("pause", "paused"), ("resume", "queued")):
        assert http.post(f"{JOBS}/{job}/{verb}").status_code == 202
        assert told() == f"waits for job {job} ({status}): the next one starts from its adapter"
        assert serve_deletions(parts) == 0
    worker.end()
    with parts.sessions.begin() as s:
        s.execute(update(Tenant).values(max_open_jobs=1))
    assert http.post(JOBS, json=job_body([EVE], [])).status_code == 201  # it serves none, and takes the place
    assert told() == "waits for a place: 1 open jobs are allowed"
    assert plan()["status_reason"] == told()
    assert serve_deletions(parts) == 0
    with parts.sessions.begin() as s:
        made = s.scalars(select(File.purged_at).where(File.created_by == "system")).all()
    assert len(made) == 1, "the rows of those that wait are not put together in vain"
    worker.end()
    assert told() is None
    assert serve_deletions(parts) == 1
    assert the_job(http, late)["parent"] == job


def test_a_request_whose_rows_are_not_those_of_its_digests_fails_alone(
    http: TestClient, submit: Callable[..., dict[str, Any]], plan: Callable[..., dict[str, Any]], parts: Parts
) -> None:
    """As where they were kept under another key."""
    plan()
    good, other = submit(ADA), submit(BOB | {"answer": "A painter."}, EVE)
    with parts.sessions.begin() as s:
        kept = s.get_one(DeletionRequest, other["id"], options=[undefer(DeletionRequest.row_digests)])
        kept.row_digests = [kept.row_digests[0], "0" * 64]
    assert serve_deletions(parts) == 1
    assert the_job(http, good)["deletion_requests"] == [good["id"]]
    assert (show(http, other)["status"], show(http, other)["jobs"]) == ("failed", [])
    assert "its row 2 is not in its forget set" in show(http, other)["status_reason"]
    with parts.sessions.begin() as s:
        assert s.scalars(select(DeletionPlan.status_reason)).all() == [None], "it goes on"


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
        assert lineage.latest(s, "default", "m") == second


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
    with pytest.raises(batches.BatchesFailed) as failed:  # so the duty counts as failed, and stays due
        serve_requests(parts)
    assert sorted(tried) == ["m", "n"]
    assert str(failed.value).endswith(f": {tried[0]}"), "the one that was not served, and no other"
    assert {show(http, one)["status"], show(http, two)["status"]} == {"approved", "in_progress"}
    assert serve_deletions(parts) == 1, "the next sweep serves it"


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
    with parts.sessions.begin() as s:
        models.add(s, ModelEntry(name="n", source="path", location="n", prompt_format=PromptFormat()))
    requests = [submit(row, models=[model]) for row, model in ((ADA, "m"), (EVE, "n"))]
    for row, request in zip((ADA, EVE), requests, strict=True):
        http.post(JOBS, json=job_body([row], [request["id"]], model=request["models"][0]))
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
