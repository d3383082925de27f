"""What faults act on: a stack of real processes with two workers, its servers, and what the database tells of the jobs."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple, TypeVar

import redis
from sqlalchemy import exc, select
from sqlalchemy.orm import Session

from service import embedded
from service.domain.job import HELD, TERMINAL, Stage
from service.local import Stack
from service.processes import running
from service.store.session import make_engine, make_sessions
from service.store.tables import Job

WORKERS = 2
LOOK_S = 0.05
PATIENCE_S = 180.0  # nothing here takes longer, even on a machine that does other things too
ALL_END_S = 900.0
LAST_STEPS = 3  # of a run: too late for a fault that must strike before its end

T = TypeVar("T")


class Victim(NamedTuple):
    """A job at the moment at which a fault strikes it, and who runs it."""

    job_id: str
    fence: int
    worker: Popen[bytes]
    runner: int  # its process id, and that of its group


class Scene:
    """Two workers run at any time. A fault that ends one calls `start_worker` before it returns.

    Args:
        opened: of the main thread; the servers and workers that are started here end with it.
    """

    def __init__(self, here: Stack, folder: Path, opened: ExitStack) -> None:
        self.here = here
        self.folder = folder
        self.sessions = make_sessions(make_engine(here.settings.database_url))
        self._opened = opened
        self._workers = [here.parts["worker"].process]
        while len(self._workers) < WORKERS:
            self.start_worker()

    # --- jobs

    def look(self, work: Callable[[Session], T]) -> T:
        """What the database says, as soon as it is there to say it."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self.sessions.begin() as s:
                    return work(s)
            except exc.OperationalError:
                assert time.monotonic() < deadline, "the database does not come back"
                time.sleep(5 * LOOK_S)

    def job(self, job_id: str) -> Job:
        return self.look(lambda s: s.get_one(Job, job_id))

    def open_jobs(self) -> list[str]:
        waiting = select(Job.id).where(Job.status.not_in(TERMINAL)).order_by(Job.id)
        return self.look(lambda s: list(s.scalars(waiting)))

    def solving(self, from_step: int) -> list[Job]:
        """Jobs in the midst of their solve: so many steps done, and a few to go."""
        here = select(Job).where(Job.status.in_(HELD), Job.stage == Stage.UNLEARNING, Job.step >= from_step)
        return [job for job in self.look(lambda s: s.scalars(here).all()) if job.step <= _steps(job) - LAST_STEPS]

    def running(self) -> list[Job]:
        return self.look(lambda s: list(s.scalars(select(Job).where(Job.status.in_(HELD)))))

    def await_ends(self) -> None:
        """Of all jobs."""
        self.until(lambda: not self.open_jobs(), "all jobs end", ALL_END_S)

    def victim(self, job: Job) -> Victim | None:
        """None: its attempt has ended since."""
        pid = int((job.lease_owner or ":0:").split(":")[1])  # worker.app: host, process id, a random word
        workers = [worker for worker in self._workers if worker.pid == pid]
        runners = list(children(pid)) if workers else []
        return Victim(job.id, job.fence, workers[0], runners[0]) if runners else None

    def until(self, holds: Callable[[], object], what: str, within_s: float = PATIENCE_S) -> None:
        """Raises AssertionError when it does not come true."""
        deadline = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline, f"waited in vain: {what}"
            time.sleep(LOOK_S)

    # --- processes

    def start_worker(self, **environment: str) -> None:
        """In the place of one that has ended, if one has."""
        self._workers = [worker for worker in self._workers if worker.poll() is None]
        log = self.folder / "logs" / f"worker-{time.monotonic_ns()}.log"
        own = self.here.environment | {"WORKER_METRICS_PORT": "0"} | environment
        command = [sys.executable, "-m", "worker.app"]
        self._workers.append(self._opened.enter_context(running(command, log, own)))

    def stop_workers(self) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait(PATIENCE_S)

    def broker(self) -> redis.Redis:
        return redis.Redis.from_url(self.here.settings.broker_url)

    def restart_broker(self, while_away: Callable[[], None]) -> None:
        """SIGKILL, and another on the same port."""
        with self.broker() as client:
            os.kill(client.info("server")["process_id"], signal.SIGKILL)
            port = client.connection_pool.connection_kwargs["port"]
        while_away()
        self._opened.enter_context(embedded.valkey(self.folder, port))

    def restart_database(self) -> None:
        """What `pg_ctl restart -m immediate` does: no checkpoint, no farewell, and recovery from the log."""
        data = self.folder / "postgres"
        pid = int((data / "postmaster.pid").read_text().split()[0])
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
        os.kill(pid, signal.SIGQUIT)
        self.until(lambda: not alive(pid), "the database's end")
        with (self.folder / "postgres.log").open("ab") as log:
            owner = data.stat().st_uid
            server = embedded.start([*command], log, signal.SIGINT, user=None if owner == os.getuid() else owner)
        self._opened.callback(server.wait)
        self._opened.callback(server.send_signal, signal.SIGINT)


def _steps(job: Job) -> int:
    return int(job.spec["budget"]["max_steps"])


def children(pid: int) -> Iterator[int]:
    """Processes that a thread of it started, and that have not ended."""
    for told in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            yield from (int(child) for child in told.read_text().split() if alive(int(child)))


def alive(pid: int) -> bool:
    """Not one that only waits to be reaped."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def signal_groups(number: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, number)


def processes(folder: Path) -> Iterator[str]:
    """Those of everybody that work in the folder, or were told of it."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_text().replace("\0", " ").strip()
            places = command, (process / "environ").read_text(errors="replace"), os.readlink(process / "cwd")
            if any(str(folder) in place for place in places) and alive(int(process.name)):
                yield command
