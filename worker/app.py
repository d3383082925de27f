"""The worker process: python -m worker.app

It hears bells, claims what is due, and supervises each job's runner in a thread of its own. torch is never imported
here. A bell says nothing but "look"; a slot that hears none looks by itself every `worker_poll_s`.
"""

import fcntl
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import structlog
from celery import Celery, signals
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import SQLAlchemyError

from service import logs
from service.dispatch import WAKE, celery_config, queue_name
from service.domain import catalog
from service.exposition import exposed
from service.settings import Settings
from service.store import evidence_keys, jobs, workers
from service.store.rows import Claim
from service.store.secrets import secrets_of
from service.store.session import AWAY, Sessions, make_engine, make_sessions
from worker import process
from worker.assignment import accelerators
from worker.lease import RETRY_S
from worker.supervise import RUNNER, Slot, supervise
from worker.telemetry import Telemetry

SLOT_WAIT_S = 1.0
LISTEN_AGAIN_S = 2.0

log = structlog.get_logger(__name__)


class Worker:
    """Slots, and the loop that fills them; run by as many threads as like to.

    Args:
        devices: the accelerators that the slots take turns at; none: runs go to the CPU.
    """

    def __init__(
        self,
        sessions: Sessions,
        settings: Settings,
        telemetry: Telemetry,
        folder: Path,
        devices: Sequence[str] = (),
        runner: Sequence[str] = RUNNER,
    ) -> None:
        self.stopping = Event()
        self._sessions = sessions
        self._settings = settings
        self._telemetry = telemetry
        self._runner = runner
        # In containers host names and process ids repeat; a name that two workers share would hide one of them.
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for number in range(settings.worker_slots):
            accelerator = devices[number % len(devices)] if devices else None
            self._free.put(Slot(number, folder / f"slot-{number}", accelerator))

    def work(self) -> None:
        """Claims and runs until nothing is due, or no slot is free."""
        while not self.stopping.is_set():
            try:  # a moment's patience: whoever frees a slot may just have found nothing, before this bell rang
                slot = self._free.get(timeout=SLOT_WAIT_S)
            except Empty:
                return
            try:
                claim = self._claim()
                if claim is None:
                    return
                supervise(
                    self._sessions, claim, self._settings, slot, self.stopping, self._telemetry, runner=self._runner
                )
            except Exception:  # the lease will lapse, and the job move on; so must the other jobs
                log.exception("the supervisor failed")
                self.stopping.wait(RETRY_S)  # what failed at once would fail as often as the processor allows
            finally:
                self._free.put(slot)

    def poll(self) -> None:
        """Works without a bell, until the end."""
        while not self.stopping.is_set():
            self.work()
            self.stopping.wait(self._settings.worker_poll_s)

    def say(self) -> None:
        """That this worker is here, and for what; again and again, until the end."""
        settings = self._settings
        while not self.stopping.is_set():
            try:
                said = (settings.worker_gpu_classes, settings.worker_vram_gib, settings.worker_slots)
                with self._sessions.begin() as s:
                    workers.seen(s, self._name, *said)
            except SQLAlchemyError as error:
                log.warning("the worker could not say that it is here", error=error)
            self.stopping.wait(workers.SAY_EVERY_S)
        with suppress(SQLAlchemyError), self._sessions.begin() as s:
            workers.gone(s, self._name)

    def _claim(self) -> Claim | None:
        settings = self._settings
        try:
            with self._sessions.begin() as s:
                claim = jobs.claim(
                    s,
                    worker=self._name,
                    classes=settings.worker_gpu_classes,
                    vram_gib=settings.worker_vram_gib,
                    lease_s=settings.lease_s,
                )
                job = jobs.get(s, claim.job_id) if claim is not None else None
        except AWAY as error:
            log.warning("nothing claimed: the database is away", error=error)
            return None
        if job is not None and job.attempt == 1 and job.started_at and job.queued_at:
            self._telemetry.waited(job.gpu_class, (job.started_at - job.queued_at).total_seconds())
        return claim


def run(settings: Settings, runner: Sequence[str] = RUNNER) -> int:
    """Works until SIGTERM or SIGINT; then gives its jobs back. Returns the exit status. For the main thread alone."""
    process.keep_secrets()
    engine = make_engine(settings.database_url)
    sessions = make_sessions(engine)
    try:
        master_key = secrets_of(settings)
        devices = accelerators(settings)
    except RuntimeError as error:
        log.error("the worker cannot start", error=str(error))
        return 1
    if devices and settings.worker_slots > len(devices):
        log.warning("slots share accelerators", slots=settings.worker_slots, accelerators=devices)
    registry = CollectorRegistry()
    telemetry = Telemetry(registry, list(catalog.load().methods), settings.gpu_classes, settings.gauge_linger_s)
    with (
        _own_folder(settings.worker_scratch_dir) as folder,
        exposed(settings.worker_metrics_host, settings.worker_metrics_port, registry) as url,
    ):
        worker = Worker(sessions, settings, telemetry, folder, devices, runner)
        try:  # with another master key no job's files can be read
            if not evidence_keys.check_master_key(sessions, master_key):
                log.warning("waiting for the database, to check MASTER_KEY")
                evidence_keys.await_master_key(sessions, master_key, worker.stopping)
        except evidence_keys.WrongMasterKey as error:
            log.error("the worker cannot start", error=str(error))
            return 1
        threads = [Thread(target=worker.poll, name=f"poll-{n}") for n in range(settings.worker_slots)]
        threads.append(Thread(target=worker.say, name="say"))
        for thread in threads:
            thread.start()
        log.info("worker started", classes=settings.worker_gpu_classes, slots=settings.worker_slots, metrics=url)
        try:
            return _listen(settings, worker.work, worker.stopping)
        finally:
            worker.stopping.set()
            for thread in threads:
                thread.join()
            engine.dispose()
            log.info("worker stopped")


def _listen(settings: Settings, work: Callable[[], None], stopping: Event) -> int:
    """Celery, until it is told to stop; its pool's threads have ended then.

    It waits by itself for a broker that cannot be reached. One that refuses a command, as a full one does, ends it: then it is
    started anew. Polling goes on meanwhile.
    """
    app = Celery("unlearn", set_as_current=False)
    app.conf.update(celery_config(settings))
    app.conf.update(
        broker_connection_max_retries=None,  # for ever
        worker_enable_remote_control=False,
        worker_redirect_stdouts=False,
    )
    app.task(work, name=WAKE, ignore_result=True)

    def stop(**_: Any) -> None:
        stopping.set()

    def leave_logging(**_: Any) -> None:  # connected: else Celery would write in a format of its own
        pass

    def hang_up(**_: Any) -> None:  # Celery would start itself anew, without us
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))

    signals.setup_logging.connect(leave_logging)
    signals.worker_shutting_down.connect(stop)
    signals.worker_ready.connect(hang_up)
    while True:
        worker = app.Worker(
            pool="threads",
            concurrency=settings.worker_slots,
            queues=[queue_name(name) for name in sorted({*settings.worker_gpu_classes, "any"})],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            loglevel=settings.log_level,
            quiet=True,
        )
        worker.start()
        if stopping.is_set():
            return int(worker.exitcode or 0)
        log.warning("the broker's connection was lost", status=worker.exitcode, listens_again_s=LISTEN_AGAIN_S)
        if stopping.wait(LISTEN_AGAIN_S):
            return 0


@contextmanager
def _own_folder(scratch: Path) -> Iterator[Path]:
    """The first folder of this kind that no other worker holds, emptied.

    What lies in it was left behind by a dead one: a runner that may still live, the keys of files that it was told.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    for number in count():
        with (scratch / f"worker-{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            own = scratch.absolute() / f"worker-{number}"
            for pid_file in own.glob("slot-*/runner.pid"):
                process.kill_leftover(pid_file)
            shutil.rmtree(own, ignore_errors=True)
            yield own
            return


def main() -> None:
    logs.configure()
    sys.__stdout__ = None  # type: ignore[misc]  # to it, Celery's signal handlers write what is no line of the log
    settings = Settings()
    logs.configure(settings.log_level)
    sys.exit(run(settings))


if __name__ == "__main__":
    main()
