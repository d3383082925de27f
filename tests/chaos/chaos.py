"""Jobs under every fault that a fleet sees: each must end exactly once, with the adapter of the undisturbed run.

    python -m tests.chaos.chaos [--jobs 24] [--seed 0]          `make chaos`; `make nightly` runs 60 jobs

The local stack (API, sweep, its own Postgres and Valkey) with two workers of one slot each runs short real jobs of a small
Llama: first each request once, undisturbed; then at least `--jobs` of them while faults strike, one after the other, each a
job in the midst of its solve. The order of the faults, and the step at which each strikes, are drawn from the seed. As long
as there are faults to come, jobs follow.

Exit status 0 only if nothing was violated. Linux; four to six minutes on two cores.
"""

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.table import Table

from service.client import Client
from service.local import stack
from service.processes import free_port, interruptible
from service.store.tables import Job
from tests.chaos import faults, judge, work
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.scene import LOOK_S, Scene, Victim, processes

EARLIEST, LATEST = 4, 10  # steps after which a fault strikes: before, there are no two checkpoints
STRIKES = 2  # of one job, at most: all have their share
AHEAD = 4  # open jobs, as long as there are faults to come
KNOBS: dict[str, Any] = {  # so that minutes show what takes hours elsewhere
    "lease_s": 6.0,
    "heartbeat_s": 0.5,
    "sweep_interval_s": 0.5,
    "ring_again_s": 1.0,
    "worker_poll_s": 2.0,
    "checkpoint_every_steps": 1,
    "worker_threads": 1,
}

WIDTH = 120  # of the table, also where it goes to a log

Submit = Callable[[int], str]  # the number of a request -> its job


class Strike(NamedTuple):
    fault: str
    struck: dict[str, int]  # jobs, with the number of each one's last event then


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.chaos", description="Jobs under faults.")
    parser.add_argument("--jobs", type=int, default=24, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    began, console = time.monotonic(), Console(highlight=False, width=WIDTH)

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - began:4.0f} s  {line}")

    folder = Path(tempfile.mkdtemp(prefix="unlearn-chaos-"))
    say(f"{folder} is removed if nothing is violated")
    with (
        interruptible(),
        ExitStack() as opened,
        stack(folder, api_port=free_port(), **KNOBS) as here,
        Client(here.url, here.key, transport=httpx.HTTPTransport()) as api,  # past any proxy of the environment
    ):
        requests = work.prepare(here, api)
        scene = Scene(here, folder, opened)

        def submit(number: int) -> str:
            return api.create_job(requests[number]).id

        say(f"{len(requests)} jobs of {work.STEPS} steps, undisturbed")
        references = undisturbed(scene, submit, len(requests))
        plan = planned(options.jobs, options.seed)
        say(f"at least {options.jobs} jobs, {len(plan)} faults")
        jobs, strikes = disturbed(scene, submit, len(requests), plan, options.jobs, say)
        say("all jobs have ended")
        scene.stop_workers()
        wrong = {job_id: judge.broken(scene, job_id, references[number]) for job_id, number in jobs.items()}
        left = judge.left_over(scene)
        console.print(_table(strikes, judge.costs(scene, strikes)))
    left += [f"{command!r} outlived the stack" for command in processes(folder)]
    for what in [*(f"{job_id}: {one}" for job_id, found in wrong.items() for one in found), *left]:
        console.print(f"VIOLATED  {what}")
    good = sum(not found for found in wrong.values())
    held = good == len(jobs) and not left
    if held:
        shutil.rmtree(folder)
    say("done")
    console.print(f"{good} of {len(jobs)} jobs ended exactly once, bit-identical to the undisturbed run")
    return 0 if held else 1


def undisturbed(scene: Scene, submit: Submit, requests: int) -> list[judge.Adapter]:
    """What each request is answered with."""
    jobs = [submit(number) for number in range(requests)]
    scene.await_ends()
    return [judge.adapter_of(scene, job_id) for job_id in jobs]


def planned(jobs: int, seed: int) -> list[tuple[Fault, int]]:
    """Each fault as often as any other, with the step after which it strikes."""
    rng = Random(seed)
    known = [fault for fault in FAULTS if fault.strike is not faults.shift_clock or faults.faketime()]
    plan = [(fault, rng.randint(EARLIEST, LATEST)) for fault in known for _ in range(max(1, jobs // 12))]
    rng.shuffle(plan)
    return plan


def disturbed(
    scene: Scene,
    submit: Submit,
    requests: int,
    plan: Sequence[tuple[Fault, int]],
    at_least: int,
    say: Callable[[str], None],
) -> tuple[dict[str, int], list[Strike]]:
    """All jobs, ended, with the numbers of their requests; and what struck them."""
    jobs, strikes, numbers = dict[str, int](), list[Strike](), count()

    def more() -> None:
        number = next(numbers) % requests
        jobs[submit(number)] = number

    while len(jobs) < at_least:
        more()
    for fault, step in plan:
        while (found := _target(scene, step, strikes)) is None:
            if len(scene.open_jobs()) < AHEAD:
                more()
            time.sleep(LOOK_S)
        job, victim = found
        struck = scene.running() if fault.everybody else [job]
        strikes.append(Strike(fault.name, {one.id: one.last_seq for one in struck}))
        say(f"{fault.name}, at step {job.step} of {job.id}")
        fault.strike(scene, victim)
    scene.await_ends()
    return jobs, strikes


def _target(scene: Scene, step: int, strikes: Sequence[Strike]) -> tuple[Job, Victim] | None:
    """Of the jobs that have come so far, the one that was struck least; none that had its share."""
    before = Counter(job_id for strike in strikes for job_id in strike.struck)
    for job in sorted(scene.solving(step), key=lambda job: before[job.id]):
        victim = scene.victim(job)
        if victim is not None and before[job.id] < STRIKES:
            return job, victim
    return None


def _table(strikes: Sequence[Strike], costs: dict[str, judge.Cost]) -> Table:
    table = Table("fault", "times", "attempts lost", "leases expired", "given back", "went on from a checkpoint")
    for fault in FAULTS:
        times = sum(strike.fault == fault.name for strike in strikes)
        cost = costs.get(fault.name, judge.NONE)
        table.add_row(fault.name, *(map(str, (times, *cost)) if times else ["skipped: libfaketime is not here"]))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
