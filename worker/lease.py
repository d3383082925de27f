"""The right to write an attempt down, and the transactions that use it."""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.orm import Session

from service.store import jobs
from service.store.rows import Beat, Claim
from service.store.session import AWAY, Sessions

RETRY_S = 0.5

T = TypeVar("T")
log = structlog.get_logger(__name__)


class LeaseLost(Exception):
    """Somebody else has the job, or must be taken to have it."""


class DatabaseAway(Exception):
    """Nothing was written, as far as we know; worth another try."""


class Lease:
    """Held for `lease_s` from the moment at which the last beat was sent, as far as this machine can know."""

    def __init__(self, sessions: Sessions, claim: Claim, lease_s: float) -> None:
        self.claim = claim
        self._sessions = sessions
        self._lease_s = lease_s
        self._until = time.monotonic() + lease_s

    def once(self, work: Callable[[Session], T]) -> T:
        """One transaction. Raises DatabaseAway; LeaseLost once that has lasted for too long."""
        try:
            with self._sessions.begin() as s:
                return work(s)
        except AWAY as error:
            log.warning("the database is away", job_id=self.claim.job_id, error=error)
            if time.monotonic() > self._until:
                raise LeaseLost("the database was away for longer than the lease") from error
            raise DatabaseAway from error

    def insist(self, work: Callable[[Session], T]) -> T:
        """One transaction, tried again for as long as the lease lasts. A try whose commit was not heard of may count."""
        while True:
            try:
                return self.once(work)
            except DatabaseAway:
                time.sleep(RETRY_S)

    def keep(self, write: Callable[[Session], bool]) -> Beat:
        """A beat, and what is to be written with it; `write` says whether it still may. Raises DatabaseAway, LeaseLost."""

        def work(s: Session) -> Beat | None:
            beat = jobs.beat(s, self.claim.job_id, self.claim.fence, self._lease_s)
            return beat if beat is not None and write(s) else None

        sent = time.monotonic()
        beat = self.once(work)
        if beat is None:
            raise LeaseLost("somebody else has the job")
        self._until = sent + self._lease_s
        return beat
