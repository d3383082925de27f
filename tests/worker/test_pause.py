"""Checkpoints, pauses and shutdowns, as the supervisor sees them: real processes, a real Postgres, no model (fake_runner.py)."""

import os
import signal
import time
from collections.abc import Callable

from sqlalchemy import select, update

from service.domain.job import Failure, FailureCode, Status
from service.store import jobs
from service.store.checkpoints import of_job
from service.store.storage import Storage
from service.store.tables import Job, JobStep
from tests.worker.test_supervise import Bench, alive, bench, until

__all__ = ["bench"]  # the fixture

SAVES = {"fake": "saves"}


def saved(bench: Bench, job_id: str) -> list[tuple[int, int]]:
    """(fence, step) of each checkpoint, newest first."""
    with bench.sessions() as s:
        return [(row.fence, row.step) for row in of_job(s, job_id)]


def steps(bench: Bench, job_id: str) -> dict[int, list[int]]:
    """By fence."""
    found: dict[int, list[int]] = {}
    with bench.sessions() as s:
        rows = select(JobStep.fence, JobStep.step).where(JobStep.job_id == job_id)
        for fence, step in s.execute(rows.order_by(JobStep.fence, JobStep.step)):
            found.setdefault(fence, []).append(step)
    return found


def checkpoint_files(bench: Bench) -> set[str]:
    return {path.name for path in bench.files_left() if path.parent.name == "checkpoints"}


def events(bench: Bench, job_id: str) -> list[str]:
    return [event.type for event in bench.events(job_id)]


def test_a_pause_costs_nothing_but_the_time_until_it_goes_on(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata=SAVES)
    with bench.running() as answer:
        until(lambda: bool(saved(bench, job_id)))
        with bench.sessions.begin() as s:
            jobs.pause(s, job_id)
    assert answer == [Status.PAUSED]
    job, at = bench.job(job_id), saved(bench, job_id)[0][1]
    assert (job.status, job.attempt, job.step, job.trained_tokens) == (Status.PAUSED, 0, at, 100 * at)
    assert max(steps(bench, job_id)[1]) == at, "no step after the checkpoint"
    assert len(saved(bench, job_id)) <= 2
    with bench.sessions.begin() as s:
        jobs.resume(s, job_id)
        s.execute(update(Job).values(spec=Job.spec.op("||")({"metadata": SAVES | {"steps": str(at + 3)}})))
    assert bench.run() is Status.SUCCEEDED
    assert steps(bench, job_id) == {2: list(range(1, at + 4))}, "those before the pause led to the result too"
    assert events(bench, job_id).count("checkpoint.resumed") == 1
    assert saved(bench, job_id) == []
    assert checkpoint_files(bench) == set()


def test_a_worker_that_stops_gives_its_attempt_back_with_a_checkpoint(
    bench: Bench, new_job: Callable[..., str]
) -> None:
    job_id = new_job(metadata=SAVES)
    with bench.running() as answer:
        pid = bench.runner_pid()
        bench.stopping.set()
    assert answer == [Status.QUEUED]
    job = bench.job(job_id)
    assert (job.attempt, job.content_failures, job.infra_losses) == (0, 0, 0)
    assert job.step == saved(bench, job_id)[0][1] == max(steps(bench, job_id)[1])
    assert not alive(pid)


def test_outside_the_solve_there_is_nothing_to_wait_for(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata={"fake": "measures"})
    with bench.running() as answer:
        until(lambda: bench.job(job_id).stage == "evaluating")
        asked_at = time.monotonic()
        bench.stopping.set()
    assert answer == [Status.QUEUED]
    assert time.monotonic() - asked_at < 2.0
    assert bench.job(job_id).infra_losses == 0


def test_a_runner_that_does_not_come_to_rest_is_ended(bench: Bench, new_job: Callable[..., str]) -> None:
    hurried = bench._replace(settings=bench.settings.model_copy(update={"drain_grace_s": 0.3}))
    job_id = new_job(metadata={"fake": "endless"})  # which does not know the word
    with hurried.running() as answer, hurried.sessions.begin() as s:
        jobs.pause(s, job_id)
    assert answer == [Status.PAUSED]
    assert bench.job(job_id).step == 0, "it has no checkpoint"


def test_who_is_pausing_can_still_be_cancelled(bench: Bench, new_job: Callable[..., str]) -> None:
    patient = bench._replace(settings=bench.settings.model_copy(update={"drain_grace_s": 20.0}))
    job_id = new_job(metadata={"fake": "endless"})  # which hears "cancel" alone
    with patient.running() as answer:
        with patient.sessions.begin() as s:
            jobs.pause(s, job_id)
        time.sleep(0.5)
        with patient.sessions.begin() as s:
            jobs.request_cancel(s, job_id)
    assert answer == [Status.CANCELLED]


def test_the_attempt_after_a_killed_one_goes_on_from_its_last_checkpoint(
    bench: Bench, new_job: Callable[..., str]
) -> None:
    job_id = new_job(metadata=SAVES | {"steps": "40"})
    with bench.running() as answer:
        until(lambda: len(saved(bench, job_id)) == 2)
        os.killpg(bench.runner_pid(), signal.SIGKILL)
    assert answer == [Status.QUEUED]
    job, kept = bench.job(job_id), saved(bench, job_id)
    assert (job.infra_losses, job.step) == (1, kept[0][1])
    assert checkpoint_files(bench) >= {f"{fence}-{step}" for fence, step in kept}
    lost = steps(bench, job_id)[1]
    bench.wait()
    assert bench.run() is Status.SUCCEEDED
    found = steps(bench, job_id)
    assert found[2] == list(range(1, 41))
    assert found.get(1, []) == [step for step in lost if step > kept[0][1]], (
        "what was lost is still told, of that attempt"
    )
    assert bench.job(job_id).trained_tokens == 4000


def test_the_last_two_stay_while_it_runs(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata=SAVES | {"steps": "40"})
    with bench.running() as answer:
        until(lambda: bench.job(job_id).step >= 30)
        rows = saved(bench, job_id)
        files = checkpoint_files(bench)
    assert answer == [Status.SUCCEEDED]
    assert len(rows) == 2
    assert len(files) <= 4, "those without a row are gone, but for what is being written just now"
    assert checkpoint_files(bench) == set()


def test_what_was_saved_and_never_promoted_goes_with_the_next_attempt(
    bench: Bench, new_job: Callable[..., str]
) -> None:
    job_id = new_job(metadata=SAVES)
    stray = f"jobs/{job_id}/checkpoints/0-7"  # its worker was killed before it heard of it
    Storage(bench.settings.storage_url).write(stray, [b"state"])
    with bench.running():
        until(lambda: bool(saved(bench, job_id)))
        assert "0-7" not in checkpoint_files(bench)
        bench.stopping.set()


def test_a_job_that_failed_goes_on_from_there_when_it_is_tried_again(bench: Bench, new_job: Callable[..., str]) -> None:
    job_id = new_job(metadata=SAVES, limits={"max_attempts": 1})
    with bench.running():
        until(lambda: bool(saved(bench, job_id)))
        bench.stopping.set()
    with bench.sessions.begin() as s:
        claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=10)
        assert claim is not None
        failure = Failure.of(FailureCode.INTERNAL_ERROR, "a bug")
        assert jobs.fail(s, job_id, claim.fence, failure) is Status.FAILED
    at = saved(bench, job_id)[0][1]
    with bench.sessions.begin() as s:
        assert jobs.retry(s, job_id).step == at
        s.execute(update(Job).values(spec=Job.spec.op("||")({"metadata": SAVES | {"steps": str(at + 2)}})))
    bench.stopping.clear()
    assert bench.run() is Status.SUCCEEDED
    assert steps(bench, job_id)[3] == list(range(1, at + 3))
