"""A job's events as they come: server-sent events (WHATWG HTML, section 9.2), which a client resumes where it stopped.

Each second the rows are read in a transaction of its own; between, a stream holds no connection and no thread.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence

import anyio
from anyio.to_thread import run_sync
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api import limits, shapes
from service.api.concurrency import ConcurrencyLimit
from service.api.deps import Parts
from service.domain.errors import Overloaded
from service.domain.identity import Principal
from service.store import reads
from service.store.session import AWAY
from service.store.tables import JobEvent

RETRY_MS = 3000
POLL_S = 1.0
PING_S = 15.0
LENGTH_S = 900.0  # then the client comes again, and is asked again who it is
AT_ONCE = 200
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: nginx, pass it on as it comes


class EventStream(Response):
    """Counted as long as it is open. Beyond the quota of its principal it is a 429."""

    media_type = EventSourceResponse.media_type

    def __init__(
        self,
        here: Parts,
        who: Principal,
        job_id: str,
        after_seq: int,
        limit: ConcurrencyLimit,
        stopping: Callable[[], bool],
    ) -> None:
        super().__init__(headers=HEADERS)
        self._whose = limits.of(who)
        self._events = follow(here, job_id, after_seq, limit, stopping)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limiter: limits.Limiter = scope["app"].state.limiter
        with limiter.stream(self._whose):
            await EventSourceResponse(self._events, headers=HEADERS)(scope, receive, send)


async def follow(
    here: Parts, job_id: str, after_seq: int, limit: ConcurrencyLimit, stopping: Callable[[], bool]
) -> AsyncIterator[bytes]:
    """Until the job has ended. It breaks off earlier, to be resumed, where the server stops or the database is away."""
    yield format_sse_event(retry=RETRY_MS)
    said = time.monotonic()
    ends = said + LENGTH_S
    while not stopping() and time.monotonic() < ends:
        try:
            async with limit.slot():
                found, ended = await run_sync(_following, here, job_id, after_seq)
        except Overloaded:  # the stream stays open: to come again would cost more than to look a second later
            found, ended = (), False
        except AWAY:
            return
        for event in found:
            yield _written(event)
            after_seq, said = event.seq, time.monotonic()
        if ended:
            return
        if time.monotonic() - said >= PING_S:
            yield KEEPALIVE_COMMENT
            said = time.monotonic()
        if len(found) < AT_ONCE:
            await anyio.sleep(POLL_S)


def _following(here: Parts, job_id: str, after_seq: int) -> tuple[Sequence[JobEvent], bool]:
    with here.sessions.begin() as s:
        return reads.following(s, job_id, after_seq, AT_ONCE)


def _written(event: JobEvent) -> bytes:
    data = shapes.event_object(event).model_dump_json()
    return format_sse_event(id=str(event.seq), event=event.type, data_str=data)
