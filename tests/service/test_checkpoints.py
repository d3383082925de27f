"""How long the checkpoints of a job stay stored: while it may go on from them."""

from collections.abc import Callable

import pytest
from sqlalchemy import text

from service.domain.job import Failure, FailureCode, Status
from service.orphans import delete_orphans
from service.settings import Settings
from service.store import checkpoints, jobs
from service.store.rows import CheckpointRow
from service.store.session import Sessions
from service.store.storage import Storage
from tests.service.test_sweep import aged, left

NewJob = Callable[..., str]
BROKEN = Failure.of(FailureCode.ROW_TOO_LONG, "row 3")
AGE = text("UPDATE jobs SET finished_at = now() - make_interval(days => :days) WHERE id = :id")


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.storage_url)


@pytest.fixture
def saving(new_job: NewJob, sessions: Sessions, storage: Storage) -> Callable[[], tuple[str, int, list[str]]]:
    """saving() -> a job that runs, its fence, and the keys of its checkpoints; the bytes of all lie there for long."""

    def run() -> tuple[str, int, list[str]]:
        new_job()
        with sessions.begin() as s:
            held = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
            assert held is not None
            keys = [aged(storage, f"jobs/{held.job_id}/checkpoints/{held.fence}-{step}", 30) for step in (1, 2)]
            saved = [CheckpointRow(step, key, 20, 64 * "a") for step, key in enumerate(keys, start=1)]
            assert jobs.log(s, held.job_id, held.fence, saved=saved)
        return held.job_id, held.fence, keys

    return run


Saving = Callable[[], tuple[str, int, list[str]]]


def rows(sessions: Sessions, job_id: str) -> list[str]:
    with sessions() as s:
        return sorted(row.key for row in checkpoints.of_job(s, job_id))


def test_those_of_a_failed_job_stay_for_a_week_after_its_end(
    saving: Saving, sessions: Sessions, storage: Storage
) -> None:
    job_id, fence, keys = saving()
    with sessions.begin() as s:
        assert jobs.fail(s, job_id, fence, BROKEN) is Status.FAILED
    for days in (0, 6):
        with sessions.begin() as s:
            s.execute(AGE, {"days": days, "id": job_id})
        assert delete_orphans(sessions, storage) == 0
        assert (rows(sessions, job_id), left(storage)) == (keys, set(keys))
    with sessions.begin() as s:
        s.execute(AGE, {"days": 8, "id": job_id})
    assert delete_orphans(sessions, storage) == 2
    assert (rows(sessions, job_id), left(storage)) == ([], set())


def test_those_of_a_job_that_is_tried_again_stay_however_long_ago_it_failed(
    saving: Saving, sessions: Sessions, storage: Storage
) -> None:
    job_id, fence, keys = saving()
    with sessions.begin() as s:
        jobs.fail(s, job_id, fence, BROKEN)
        s.execute(AGE, {"days": 8, "id": job_id})
    with sessions.begin() as s:
        assert jobs.retry(s, job_id).step == 2
    assert delete_orphans(sessions, storage) == 0
    assert (rows(sessions, job_id), left(storage)) == (keys, set(keys))


def test_what_was_stored_without_a_row_goes_when_the_job_has_ended(
    saving: Saving, sessions: Sessions, storage: Storage
) -> None:
    """A runner was killed between the bytes and the row, or the row is not among the newest any more."""
    job_id, fence, keys = saving()
    torn = aged(storage, f"jobs/{job_id}/checkpoints/{fence}-3", 0)
    assert delete_orphans(sessions, storage) == 0, "its runner may be about to tell of it"
    with sessions.begin() as s:
        jobs.fail(s, job_id, fence, BROKEN)
    assert delete_orphans(sessions, storage) == 1
    assert torn not in left(storage)
    assert left(storage) == set(keys)


def test_those_of_a_job_that_runs_or_waits_stay_and_of_one_that_is_cancelled_go(
    saving: Saving, sessions: Sessions, storage: Storage
) -> None:
    job_id, fence, keys = saving()
    assert delete_orphans(sessions, storage) == 0
    with sessions.begin() as s:
        assert jobs.release(s, job_id, fence)
    assert delete_orphans(sessions, storage) == 0
    assert (rows(sessions, job_id), left(storage)) == (keys, set(keys))
    with sessions.begin() as s:
        jobs.request_cancel(s, job_id)
    assert rows(sessions, job_id) == [], "at once"
    assert delete_orphans(sessions, storage) == 2
    assert left(storage) == set()
