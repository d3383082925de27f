"""How long a job has waited for no reason that is known: what the alert on a stalled queue goes by."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import func, update

from service.domain.job import Resources
from service.store import jobs, metrics, workers
from service.store.session import Sessions
from service.store.tables import Job, Tenant

NewJob = Callable[..., str]
Ages = Callable[[], dict[str, float]]
HOUR_S = 3600.0


@pytest.fixture
def stalled(sessions: Sessions) -> Ages:
    def read() -> dict[str, float]:
        with sessions() as s:
            found = metrics.figures(s)
        ages = found.queue_stalled_age_s
        assert all(age <= found.queue_oldest_age_s[gpu_class] for gpu_class, age in ages.items())
        return ages

    return read


@pytest.fixture
def waiting(new_job: NewJob, sessions: Sessions) -> NewJob:
    """waiting(gpu_class, min_vram_gib) -> a job that was queued an hour ago."""

    def create(gpu_class: str = "any", min_vram_gib: float | None = None) -> str:
        job_id = new_job(resources=Resources(gpu_class=gpu_class, min_vram_gib=min_vram_gib))
        with sessions.begin() as s:
            s.execute(update(Job).where(Job.id == job_id).values(updated_at=func.now() - timedelta(seconds=HOUR_S)))
        return job_id

    return create


def works(
    sessions: Sessions, name: str, *classes: str, vram_gib: float = 0, slots: int = 1, on: str | None = None
) -> None:
    """A worker says that it is there, and takes the job of class `on`."""
    with sessions.begin() as s:
        workers.seen(s, name, classes, vram_gib, slots)
    if on is not None:
        with sessions.begin() as s:
            assert jobs.claim(s, worker=name, classes=[on], vram_gib=vram_gib, lease_s=60)


def test_a_job_that_an_idle_worker_leaves_lying_is_stalled(waiting: NewJob, stalled: Ages, sessions: Sessions) -> None:
    works(sessions, "w", "cpu")
    waiting("cpu")
    assert stalled()["cpu"] == pytest.approx(HOUR_S, abs=30)


@pytest.mark.parametrize("gpu_class", ["any", "cpu"])
def test_one_whose_worker_is_busy_in_another_class_is_not(
    gpu_class: str, new_job: NewJob, waiting: NewJob, stalled: Ages, sessions: Sessions
) -> None:
    new_job(resources=Resources(gpu_class="gpu"))
    works(sessions, "w", "gpu", "cpu", on="gpu")
    waiting(gpu_class)
    assert stalled() == {}
    works(sessions, "idle", "tpu")
    assert stalled().keys() == {"any"} & {gpu_class}, "what the second worker hears too, it could take"


def test_one_whose_worker_has_a_slot_free_is_until_that_is_taken_too(
    new_job: NewJob, waiting: NewJob, stalled: Ages, sessions: Sessions
) -> None:
    for gpu_class in ("gpu", "tpu"):
        new_job(resources=Resources(gpu_class=gpu_class))
    works(sessions, "w", "gpu", "tpu", "cpu", slots=2, on="gpu")
    waiting("cpu")
    assert stalled()["cpu"] == pytest.approx(HOUR_S, abs=30)
    works(sessions, "w", "gpu", "tpu", "cpu", slots=2, on="tpu")
    assert stalled() == {}
    works(sessions, "w", "gpu", "tpu", "cpu", slots=3)
    assert stalled().keys() == {"cpu"}, "it was started again with more"


def test_one_that_no_worker_can_run_is_stalled_however_busy_they_are(
    new_job: NewJob, waiting: NewJob, stalled: Ages, sessions: Sessions
) -> None:
    new_job(resources=Resources(gpu_class="gpu"))
    works(sessions, "w", "gpu", vram_gib=16, on="gpu")
    waiting("cpu")
    waiting("gpu", 80)
    waiting("gpu", 8)
    assert stalled().keys() == {"cpu", "gpu"}
    works(sessions, "w", "gpu", "cpu", vram_gib=80)
    assert stalled() == {}


def test_one_whose_tenant_runs_as_many_as_it_may_is_not(
    new_job: NewJob, waiting: NewJob, stalled: Ages, sessions: Sessions
) -> None:
    new_job(resources=Resources(gpu_class="gpu"))
    works(sessions, "w", "gpu", on="gpu")
    works(sessions, "idle", "cpu")
    waiting("cpu")
    assert stalled().keys() == {"cpu"}
    for limit, found in ((1, set()), (2, {"cpu"})):
        with sessions.begin() as s:
            s.execute(update(Tenant).values(max_running_jobs=limit))
        assert stalled().keys() == found


def test_one_that_waits_after_a_failure_is_not(waiting: NewJob, stalled: Ages, sessions: Sessions) -> None:
    waiting("cpu")
    works(sessions, "w", "cpu")
    for wait, found in ((60, set()), (-60, {"cpu"})):
        with sessions.begin() as s:
            s.execute(update(Job).values(not_before=func.now() + timedelta(seconds=wait)))
        assert stalled().keys() == found
