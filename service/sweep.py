"""A process of its own that leaves nothing behind: jobs whose worker fell silent move on, bells ring again, approved
requests get their jobs, certificates are signed, webhooks are sent, and what is stored and nobody needs is deleted.

python -m service.sweep. Several may run: rows that one works on, the others pass over.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import NamedTuple

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from sqlalchemy.exc import SQLAlchemyError

from service import logs
from service.api.deps import Parts
from service.attest import check_logs, issue_due
from service.batches import serve_deletions
from service.dispatch import CeleryDispatcher, Dispatcher
from service.domain import catalog
from service.domain.errors import InvalidTransition, UnlearnError
from service.exposition import exposed
from service.orphans import delete_orphans
from service.settings import Settings
from service.store import deletions, evidence, evidence_keys, files, idempotency, jobs, outbox
from service.store.secrets import secrets_of
from service.store.session import Sessions, make_engine, make_sessions
from service.store.storage import Storage
from service.store.tables import Job
from service.webhook_sender import keep_sending

HOURLY_S = 3600.0
BUCKETS_S = (0.01, 0.1, 0.5, 1, 5, 30, 120, 600)
STOP_S = 2.0
EXPECTED = (UnlearnError, SQLAlchemyError)  # the database or the storage is away, or not ready yet: it will come

log = structlog.get_logger(__name__)


class Figures:
    """Metrics of the sweep: last success, delay, duration and failures of each duty, and outstanding certificates."""

    def __init__(self, registry: CollectorRegistry) -> None:
        name, labels = "unlearn_sweep_duty", ["duty"]
        self._done = Gauge(
            f"{name}_last_success_timestamp_seconds",
            "end of the last successful run; 0: never",
            labels,
            registry=registry,
        )
        self._due_age = Gauge(
            f"{name}_due_age_seconds",
            "how long the duty has been due without being done; 0: not due",
            labels,
            registry=registry,
        )
        self._seconds = Histogram(
            f"{name}_seconds", "how long it takes, also where it fails", labels, buckets=BUCKETS_S, registry=registry
        )
        self._failures = Counter(f"{name}_failures", "how often it failed", labels, registry=registry)
        self.certificates_waiting = Gauge(
            "unlearn_certificates_waiting",
            "succeeded jobs without a certificate or a refusal, counted after each attempt to issue them",
            registry=registry,
        )
        self._due_at: dict[str, float] = {}

    def due(self, duty: str, wait_s: float = 0.0) -> None:
        """Schedules the next run in `wait_s` seconds; the first call makes the duty's series."""
        if duty not in self._due_at:
            self._done.labels(duty)
            self._failures.labels(duty)
            self._due_age.labels(duty).set_function(lambda: max(0.0, time.monotonic() - self._due_at[duty]))
        self._due_at[duty] = time.monotonic() + wait_s

    @contextmanager
    def of(self, duty: str) -> Iterator[None]:
        with self._seconds.labels(duty).time(), self._failures.labels(duty).count_exceptions():
            yield
        self._done.labels(duty).set_to_current_time()


class Duty(NamedTuple):
    do: Callable[[Parts], object]
    every_s: float | None = None  # after a success; None, and after a failure: sweep_interval_s


class Swept(NamedTuple):
    expired: int  # leases
    rung: list[str]  # GPU classes


def sweep_once(sessions: Sessions, dispatcher: Dispatcher, settings: Settings) -> Swept:
    expired = list(_expire(sessions, settings))
    for job in expired:
        log.warning("lease expired", job_id=job.id, status=job.status, attempt=job.attempt, reason=job.status_reason)
    with sessions.begin() as s:
        due = jobs.due_classes(s, settings.ring_again_s)
        jobs.rung(s, due)
    return Swept(len(expired), [gpu_class for gpu_class in due if dispatcher.ring(gpu_class)])


def _expire(sessions: Sessions, settings: Settings) -> Iterator[Job]:
    """One job to a transaction: two with requests of several jobs could each wait for the other's."""
    while True:
        with sessions.begin() as s:
            settled = jobs.expire(s, settings.infra_losses_max, limit=1)
        if not settled:
            return
        yield from settled


def purge_due(sessions: Sessions, storage: Storage) -> int:
    """Files whose time is over: the key first, in a transaction of its own each, then the bytes. How many."""
    with sessions.begin() as s:
        due = files.due(s)
    for file_id in due:
        with suppress(InvalidTransition):  # a job has come that needs it
            with sessions.begin() as s:
                key = files.purge(s, file_id)
            storage.delete(key)  # where this fails, it is noise, and an orphan
            log.info("purged a file", file_id=file_id)
    return len(due)


def forget_answers(sessions: Sessions) -> int:
    """What was answered under Idempotency-Keys that have expired. How many."""
    with sessions.begin() as s:
        return idempotency.forget(s)


def run(settings: Settings, stop: Event) -> None:
    """Every duty in a thread of its own: a slow or broken storage must not keep leases from expiring."""
    engine = make_engine(settings.database_url)
    dispatcher = CeleryDispatcher(settings)
    parts = Parts(
        settings,
        make_sessions(engine),
        Storage(settings.storage_url),
        dispatcher,
        catalog.load(),
        secrets_of(settings),
        None,
    )
    with suppress(UnlearnError):  # the storage is unavailable: the duties report it until it is there
        parts.storage.create()  # as the API does, which may start later
    registry = CollectorRegistry()
    figures = Figures(registry)
    duties = {
        "jobs": Duty(lambda here: sweep_once(here.sessions, here.dispatcher, here.settings)),
        "deletion requests": Duty(serve_requests),
        "certificates": Duty(lambda here: certify(here, figures)),
        "audit logs": Duty(lambda here: check_logs(here.sessions)),
        "purges": Duty(purge),
        "orphans": Duty(delete_what_is_left, every_s=HOURLY_S),
    }
    for name in duties:
        figures.due(name)
    threads = [
        *(
            Thread(target=_keep, args=(parts, name, duty, figures, stop), name=name, daemon=True)
            for name, duty in duties.items()
        ),
        *(
            Thread(target=keep_sending, args=(settings, parts.sessions, stop), name=f"webhooks {number}", daemon=True)
            for number in range(settings.webhook_threads)
        ),
    ]
    with exposed(settings.sweep_metrics_host, settings.sweep_metrics_port, registry) as url:
        log.info("sweep started", interval_s=settings.sweep_interval_s, metrics=url)
        if not evidence_keys.check_master_key(parts.sessions, parts.secrets):
            log.warning("waiting for the database, to check MASTER_KEY")
            evidence_keys.await_master_key(parts.sessions, parts.secrets, stop)
        for thread in threads:
            thread.start()
        stop.wait()
    stopped_at = time.monotonic()
    for thread in threads:  # what is cut off is taken up again
        thread.join(max(0.0, stopped_at + STOP_S - time.monotonic()))
    dispatcher.close()
    engine.dispose()
    log.info("sweep stopped")


def _keep(here: Parts, name: str, duty: Duty, figures: Figures, stop: Event) -> None:
    while not stop.is_set():
        wait_s = here.settings.sweep_interval_s
        try:
            with figures.of(name):
                duty.do(here)
        except Exception as error:  # it stays due
            trace = not isinstance(error, EXPECTED)
            log.error("a duty failed", duty=name, error=error, exc_info=trace)
        else:
            wait_s = duty.every_s or wait_s
            figures.due(name, wait_s)
        stop.wait(wait_s)


# --- duties


def serve_requests(here: Parts) -> None:
    with here.sessions.begin() as s:
        overdue = deletions.note_overdue(s)
    for request_id in overdue:
        log.warning("a deletion request is overdue", request_id=request_id)
    serve_deletions(here)


def certify(here: Parts, figures: Figures) -> None:
    issue_due(here.sessions, here.storage, here.secrets)
    with here.sessions.begin() as s:
        figures.certificates_waiting.set(evidence.waiting(s))


def purge(here: Parts) -> None:
    purge_due(here.sessions, here.storage)
    forget_answers(here.sessions)


def delete_what_is_left(here: Parts) -> None:
    delete_orphans(here.sessions, here.storage)
    with here.sessions.begin() as s:
        outbox.forget(s)


def main() -> None:
    logs.configure()
    settings = Settings()
    logs.configure(settings.log_level)
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(settings, stop)
    except RuntimeError as error:  # of a setting; this and the worker's, which have no other place for their words
        log.error("the sweep cannot start", error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
