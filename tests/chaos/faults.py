"""The faults. Each strikes a job in the midst of its solve, comes back when it has passed, and leaves two workers running.

A fault that must have an effect at once asserts it; what became of the jobs is judged at the end (judge.py).
"""

import os
import resource
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import NamedTuple

from service.store.checkpoints import of_job
from tests.chaos.scene import Scene, Victim, alive, signal_groups

FULL_BYTES = 4096  # less than a checkpoint
SETTLED_S = 1.0  # what a stopped runner had told has its row by then: two beats
SYSTEM_FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))

_hours = count()


class Fault(NamedTuple):
    name: str
    strike: Callable[[Scene, Victim], None]
    everybody: bool = False  # whoever runs is struck, and not the victim alone


def kill_worker_and_runner(scene: Scene, victim: Victim) -> None:
    signal_groups(SIGKILL, [victim.worker.pid, victim.runner])
    victim.worker.wait()
    scene.start_worker()


def kill_worker(scene: Scene, victim: Victim) -> None:
    victim.worker.kill()
    victim.worker.wait()
    scene.until(lambda: not alive(victim.runner), "the runner dies with its worker")
    scene.start_worker()


def kill_runner(scene: Scene, victim: Victim) -> None:
    signal_groups(SIGKILL, [victim.runner])
    scene.until(lambda: not alive(victim.runner), "it dies")


def freeze_worker(scene: Scene, victim: Victim) -> None:
    """The runner goes on, and may end; when the worker wakes, somebody else has the job."""
    _freeze(scene, victim, [victim.worker.pid])


def freeze_both(scene: Scene, victim: Victim) -> None:
    """As a virtual machine that is moved."""
    _freeze(scene, victim, [victim.worker.pid, victim.runner])


def _freeze(scene: Scene, victim: Victim, groups: Sequence[int]) -> None:
    signal_groups(SIGSTOP, groups)
    try:
        scene.until(
            lambda: scene.job(victim.job_id).fence > victim.fence, "another attempt, while the worker is frozen"
        )
    finally:
        signal_groups(SIGCONT, groups)
    scene.until(lambda: not alive(victim.runner), "the runner of a lost lease is killed")


def stop_worker(scene: Scene, victim: Victim) -> None:
    """SIGTERM: a checkpoint, and the attempt is given back."""
    victim.worker.terminate()
    assert victim.worker.wait(60) == 0, "a worker that is told to stop ends well"
    scene.start_worker()


def shift_clock(scene: Scene, victim: Victim) -> None:
    """The worker's place is taken by one whose clock is an hour ahead, or behind."""
    victim.worker.terminate()
    victim.worker.wait(60)
    ahead = "+1h" if next(_hours) % 2 == 0 else "-1h"
    scene.start_worker(LD_PRELOAD=str(faketime()), FAKETIME=ahead, FAKETIME_DONT_FAKE_MONOTONIC="1")


def flush_broker(scene: Scene, victim: Victim) -> None:
    with scene.broker() as client:
        client.flushall()


def cut_connections(scene: Scene, victim: Victim) -> None:
    """CLIENT KILL of everybody but the one who asks."""
    with scene.broker() as client:
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)


def kill_broker(scene: Scene, victim: Victim) -> None:
    """It stays away until the job has gone on without it."""
    before = scene.job(victim.job_id).version
    scene.restart_broker(
        lambda: scene.until(lambda: scene.job(victim.job_id).version > before, "a job goes on without a broker")
    )


def restart_database(scene: Scene, victim: Victim) -> None:
    scene.restart_database()


def fill_disk(scene: Scene, victim: Victim) -> None:
    """No file of the runner may grow beyond a few KiB, until it has told of a checkpoint that it could not save."""

    def noticed() -> bool:
        job = scene.job(victim.job_id)
        return any(one["code"] == "checkpoint_not_saved" for one in job.warnings) or not alive(victim.runner)

    before = resource.prlimit(victim.runner, resource.RLIMIT_FSIZE)
    resource.prlimit(victim.runner, resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))
    scene.until(noticed, "a checkpoint that cannot be saved is told of")
    if alive(victim.runner):
        resource.prlimit(victim.runner, resource.RLIMIT_FSIZE, before)


def tear_checkpoint(scene: Scene, victim: Victim) -> None:
    """A crash of the machine left half of the last one."""

    def tear(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    _spoil(scene, victim, tear)


def alter_checkpoint(scene: Scene, victim: Victim) -> None:
    """One bit, in the middle of the last one."""

    def alter(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    _spoil(scene, victim, alter)


def _spoil(scene: Scene, victim: Victim, spoil: Callable[[Path], None]) -> None:
    """Then the worker and the runner are killed, so that somebody wants to go on from there."""
    signal_groups(SIGSTOP, [victim.runner])
    time.sleep(SETTLED_S)
    keys = scene.look(lambda s: [row.key for row in of_job(s, victim.job_id)])
    spoil(Path(scene.here.settings.storage_url) / keys[0])
    kill_worker_and_runner(scene, victim)


def faketime() -> Path | None:
    """The library, of the system or of the wheel."""
    found = find_spec("libfaketime")
    wheel = (
        [Path(folder) / "vendor/libfaketime/src/libfaketime.so.1" for folder in found.submodule_search_locations]
        if (found and found.submodule_search_locations)
        else []
    )
    return next((path for path in [*SYSTEM_FAKETIME, *wheel] if path.exists()), None)


FAULTS = (
    Fault("SIGKILL of a worker and its runner", kill_worker_and_runner),
    Fault("SIGKILL of a worker", kill_worker),
    Fault("SIGKILL of a runner", kill_runner),
    Fault("SIGSTOP of a worker beyond its lease", freeze_worker),
    Fault("SIGSTOP of a worker and its runner", freeze_both),
    Fault("SIGTERM of a worker", stop_worker),
    Fault("clock of a worker an hour off", shift_clock),
    Fault("FLUSHALL", flush_broker, everybody=True),
    Fault("CLIENT KILL of all connections", cut_connections, everybody=True),
    Fault("SIGKILL and restart of the broker", kill_broker, everybody=True),
    Fault("immediate restart of the database", restart_database, everybody=True),
    Fault("full disk at a checkpoint", fill_disk),
    Fault("torn checkpoint", tear_checkpoint),
    Fault("altered checkpoint", alter_checkpoint),
)
