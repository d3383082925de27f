"""The statuses of a job, as the table of moves has them and as whoever writes leads through them."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from service.domain.job import TERMINAL, TRANSITIONS, JobSpec, Status
from service.store import jobs, tenancy
from service.store.session import Sessions, make_sessions
from service.store.tenants import DEFAULT
from tests.conftest import owner
from tests.service.fleet import CLEAR, LEASE_S, Fleet

S = Status


@pytest.fixture
def walk(
    sessions: Sessions, new_job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """walk(examples, steps in each): on one connection, beside the owner's, who looks and cleans up."""
    monkeypatch.setattr(jobs, "_wait_s", lambda failures: LEASE_S)  # else a slow machine would end a rest by itself
    with sessions.begin() as s:
        spec = JobSpec.model_validate(jobs.get(s, new_job()).spec)
    ours = owner(sessions).execution_options(isolation_level="AUTOCOMMIT")
    with sessions.kw["bind"].connect() as one, ours.connect() as look:
        look.execute(CLEAR)
        workers = make_sessions(one)
        users = tenancy.bound(workers, DEFAULT, "tester")

        class Here(Fleet):
            def __init__(self) -> None:
                super().__init__(users, workers, look, spec)

        def run(examples: int, steps: int, derandomize: bool = False) -> None:
            wanted = settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=derandomize,
                deadline=None,
                database=None,
                phases=[Phase.generate],  # to shrink a walk takes minutes, and a timeout amid it looks like flakiness
                suppress_health_check=list(HealthCheck),
            )
            run_state_machine_as_test(Here, settings=wanted)

        yield run


def test_a_job_ends_once_whoever_writes_when(walk: Callable[..., None]) -> None:
    walk(60, 7, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_ends_once_in_long_walks(walk: Callable[..., None]) -> None:
    walk(2000, 20)


def test_every_status_is_reached_and_has_a_way_to_an_end() -> None:
    def reach(start: Status) -> set[Status]:
        found = {start}
        while more := {target for status in found for target in TRANSITIONS[status]} - found:
            found |= more
        return found

    assert set(TRANSITIONS) == set(Status)
    assert reach(S.QUEUED) | reach(S.PENDING_APPROVAL) == set(Status), "no status is out of reach"
    for status in Status:
        assert reach(status) & TERMINAL, status
        assert status in TERMINAL or TRANSITIONS[status], status
    again = {status for status in TERMINAL if TRANSITIONS[status]}
    assert again == {S.FAILED}, "an end is one, but a person may have a failed job tried again"
