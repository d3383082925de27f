"""A job that runs is paused: its worker saves a checkpoint, stops, and gives the attempt back."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import text
from starlette.testclient import TestClient

from service.domain.job import Status
from service.store import jobs
from service.store.rows import Beat, CheckpointRow, Claim
from service.store.session import Sessions
from tests.service.conftest import JOBS, Bell


def claim(sessions: Sessions) -> Claim:
    with sessions.begin() as s:
        found = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    assert found is not None
    return found


def is_refused(reply: Any) -> bool:
    return (reply.status_code, reply.json().get("type")) == (409, "/docs#invalid-transition")


def test_a_job_that_runs_is_paused_when_its_worker_has_stopped(
    http: TestClient, sessions: Sessions, bell: Bell, new_job: Callable[..., str]
) -> None:
    path = f"{JOBS}/{new_job()}"
    held = claim(sessions)
    for _ in range(2):  # twice is once
        reply = http.post(f"{path}/pause")
        assert (reply.status_code, reply.json()["status"], reply.json()["version"]) == (202, "pausing", 3)
    assert is_refused(http.post(f"{path}/resume"))
    with sessions.begin() as s:
        assert jobs.beat(s, held.job_id, held.fence, 60) == Beat(pause=True)
        assert jobs.paused(s, held.job_id, held.fence) is Status.PAUSED
    shown = http.get(path).json()
    assert (shown["status"], shown["attempt"]) == ("paused", 0), "the attempt is given back"
    assert "paused on request" in shown["status_reason"]
    assert [one["outcome"] for one in http.get(f"{path}/attempts").json()["data"]] == ["given_back"]
    bell.rung.clear()
    assert (http.post(f"{path}/resume").json()["status"], bell.rung) == ("queued", ["any"])
    types = [event["type"] for event in http.get(f"{path}/events").json()["data"]]
    stopped = ["pause.requested", "attempt.requeued", "job.paused", "job.resumed", "job.queued"]
    assert types == ["job.created", "job.queued", "job.started", *stopped]


def test_a_job_that_was_to_pause_can_still_be_cancelled(
    http: TestClient, sessions: Sessions, new_job: Callable[..., str]
) -> None:
    path = f"{JOBS}/{new_job()}"
    held = claim(sessions)
    for verb, status in (("pause", "pausing"), ("cancel", "cancelling")):
        assert http.post(f"{path}/{verb}").json()["status"] == status
    assert is_refused(http.post(f"{path}/pause"))
    with sessions.begin() as s:
        assert jobs.paused(s, held.job_id, held.fence) is Status.CANCELLED
    assert http.get(path).json()["status"] == "cancelled"


def test_checkpoints_are_listed_the_newest_first(
    http: TestClient, sessions: Sessions, new_job: Callable[..., str]
) -> None:
    path = f"{JOBS}/{new_job()}/checkpoints"
    assert http.get(path).json() == {"object": "list", "data": [], "has_more": False}
    for step in (10, 20):
        held = claim(sessions)
        saved = CheckpointRow(step, f"jobs/{held.job_id}/checkpoints/{step}", 1000 + step, 64 * "a")
        with sessions.begin() as s:
            assert jobs.log(s, held.job_id, held.fence, saved=[saved])
            jobs.lose(s, held.job_id, held.fence, "its machine went away", 10)
            s.execute(text("UPDATE jobs SET not_before = now()"))
    found = http.get(path).json()["data"]
    assert [(one["step"], one["attempt"], one["bytes"], one["object"]) for one in found] == [
        (20, 2, 1020, "unlearning.job.checkpoint"),
        (10, 1, 1010, "unlearning.job.checkpoint"),
    ]
    assert not {"key", "fence"} & set(found[0]), "where it lies is nobody's business"
    assert http.get(f"{JOBS}/ujob_{32 * '0'}/checkpoints").status_code == 404
