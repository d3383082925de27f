"""Which attempts a job has had: who ran them, from when to when, and how they ended."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from service.store.reads import ATTEMPT_BEGINS, ATTEMPT_ENDS
from service.store.tables import JobEvent

Outcome = Literal["running", "lost", "given_back", "succeeded", "failed", "cancelled"]


class AttemptObject(BaseModel):
    object: Literal["unlearning.job.attempt"] = "unlearning.job.attempt"
    attempt: int = Field(description="one that is given back, since its worker stopped, counts as if it had never been")
    worker: str
    started_at: datetime
    ended_at: datetime | None
    outcome: Outcome
    message: str | None = Field(description="how it ended")


class Attempts(BaseModel):
    object: Literal["list"] = "list"
    data: list[AttemptObject]
    has_more: Literal[False] = False


def told(events: Sequence[JobEvent]) -> Iterator[AttemptObject]:
    """From the events with which attempts begin and end, in order. A job may also end between two attempts."""
    running: AttemptObject | None = None
    for event in events:
        if event.type == ATTEMPT_BEGINS:
            running = AttemptObject(
                attempt=event.attempt,
                worker=event.data["worker"],
                started_at=event.created_at,
                ended_at=None,
                outcome="running",
                message=None,
            )
        elif running is not None:
            ended = {"ended_at": event.created_at, "outcome": ATTEMPT_ENDS[event.type], "message": event.message}
            yield running.model_copy(update=ended)
            running = None
    if running is not None:
        yield running
