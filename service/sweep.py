"""A process of its own that leaves nothing behind: jobs whose worker fell silent move on, bells ring again.

python -m service.sweep. Several may run: rows that one works on, the others pass over.
"""

import signal
from threading import Event
from typing import NamedTuple

import structlog
from sqlalchemy.exc import SQLAlchemyError

from service import logs
from service.dispatch import CeleryDispatcher, Dispatcher
from service.settings import Settings
from service.store import jobs
from service.store.session import Sessions, make_engine, make_sessions

log = structlog.get_logger(__name__)


class Swept(NamedTuple):
    expired: int  # leases
    rung: list[str]  # GPU classes


def sweep_once(sessions: Sessions, dispatcher: Dispatcher, settings: Settings) -> Swept:
    with sessions.begin() as s:
        expired = jobs.expire(s, settings.infra_losses_max)
    for job in expired:
        log.warning("lease expired", job_id=job.id, status=job.status, attempt=job.attempt, reason=job.status_reason)
    with sessions.begin() as s:
        due = jobs.due_classes(s, settings.ring_again_s)
        jobs.rung(s, due)
    return Swept(len(expired), [gpu_class for gpu_class in due if dispatcher.ring(gpu_class)])


def run(settings: Settings, stop: Event) -> None:
    engine = make_engine(settings.database_url)
    sessions = make_sessions(engine)
    dispatcher = CeleryDispatcher(settings)
    log.info("sweep started", interval_s=settings.sweep_interval_s)
    while not stop.is_set():
        try:
            sweep_once(sessions, dispatcher, settings)
        except SQLAlchemyError as error:  # the database is away, or not migrated yet: it will come
            log.error("sweep failed", error=str(error).partition("\n")[0])
        stop.wait(settings.sweep_interval_s)
    dispatcher.close()
    engine.dispose()
    log.info("sweep stopped")


def main() -> None:
    settings = Settings()
    logs.configure(settings.log_level)
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run(settings, stop)


if __name__ == "__main__":
    main()
