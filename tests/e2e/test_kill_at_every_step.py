"""A runner that is killed (SIGKILL, a real process) at a step, and another that goes on: the same adapter, bit for bit.

The test is the supervisor: it starts `python -m worker.run` as that does, hears its records from the pipe, kills it in the
moment in which it hears of a step's checkpoint, and hands the next one the last two of which it has heard.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from tests.worker.conftest import register
from tests.worker.test_checkpoint import adapter, attempt
from tests.worker.test_run import Assign, assign
from worker.process import Runner, started
from worker.records import (
    AnyRecord,
    Assignment,
    CheckpointRecord,
    CheckpointRef,
    ResumedRecord,
    StepRecord,
    parse_record,
)

__all__ = ["assign", "register"]  # the fixtures

STEPS = 20
METHODS: dict[str, dict[str, Any]] = {"pdu": {}, "blur_npo": {}, "ofmu": {"inner_steps": 2}}
AT_ONCE = 2  # processes of one thread each

Job = Callable[[str], Assignment]


@pytest.fixture
def job(assign: Assign) -> Job:
    """job(method) -> twenty steps, a checkpoint after each."""

    def build(method: str) -> Assignment:
        chosen = {"learning_rate": 1e-3, "forget_rows": 2, "retain_rows": 2, **METHODS[method]}
        asked = assign(method, chosen, budget={"max_steps": STEPS})
        return asked.model_copy(update={"checkpoint_every_steps": 1, "checkpoint_every_s": 300.0, "threads": 1})

    return build


def runner(
    job: Assignment, folder: Path, told: Sequence[AnyRecord] = (), *, fence: int, kill_after: int | None = None
) -> list[AnyRecord]:
    """What a runner tells until its end, or until it is killed because it has told of that step's checkpoint."""
    place = folder / str(fence)
    place.mkdir(parents=True)
    saved = [record for record in told if isinstance(record, CheckpointRecord)][-2:]
    again = {
        "job_id": folder.name,
        "attempt": fence,
        "fence": fence,
        "prefix": f"jobs/{folder.name}/attempts/{fence}",
        "scratch_dir": place,
        "checkpoints": [CheckpointRef(step=r.step, key=r.key, sha256=r.sha256) for r in reversed(saved)],
    }
    path = place / "assignment.json"
    path.write_text(job.model_copy(update=again).model_dump_json())
    heard: list[AnyRecord] = []
    with started([sys.executable, "-m", "worker.run", str(path)], {}, place / "runner.pid") as running:
        for record in records(running):
            heard.append(record)
            if isinstance(record, CheckpointRecord) and record.step == kill_after:
                running.signal(SIGKILL)
                break
    return heard


def records(running: Runner) -> Iterator[AnyRecord]:
    while running.exit_code() is None:
        yield from map(parse_record, running.lines(0.2))
    yield from map(parse_record, running.rest())


def killed_and_resumed(job: Assignment, folder: Path, step: int) -> AnyRecord:
    """The last record of the second runner, which does the steps behind that one."""
    first = runner(job, folder, fence=1, kill_after=step)
    assert isinstance(first[-1], CheckpointRecord), "it was killed in the midst of its solve"
    second = runner(job, folder, first, fence=2)
    assert [record.step for record in second if isinstance(record, ResumedRecord)] == [step]
    assert [record.step for record in second if isinstance(record, StepRecord)] == [*range(step + 1, STEPS + 1)]
    return second[-1]


def kills(job: Job, folder: Path, steps: dict[str, Sequence[int]]) -> list[bool]:
    """Of each kill: whether the adapter was that of the undisturbed run, which is done in this process."""
    jobs = {method: job(method) for method in steps}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        resumed = [
            (method, pool.submit(killed_and_resumed, jobs[method], folder / f"{method}-{step}", step))
            for method in jobs
            for step in steps[method]
        ]
        whole = {method: adapter(attempt(jobs[method], folder, fence=number)[0]) for number, method in enumerate(jobs)}
        return [adapter(last.result()) == whole[method] for method, last in resumed]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_every_step_of_each_method(job: Job, tmp_path: Path) -> None:
    same = kills(job, tmp_path, {method: range(1, STEPS + 1) for method in METHODS})
    print(f"{len(same)} resumes, {sum(same)} identical adapters")
    assert (len(same), sum(same)) == (60, 60)
