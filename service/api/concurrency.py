"""Load shedding: how many requests are carried out at once, how many wait for that, and which are refused with 503.

Threads and connections of the database are few. A request takes its slot when its body is there, and gives it back
before its answer is sent: whoever sends or reads slowly keeps none. An `async def` endpoint takes none; what it does in
a thread it limits itself.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from inspect import iscoroutinefunction
from typing import Literal

import anyio
from fastapi import Request

from service.api.shapes import BENCHMARKS_PATH, FILES_PATH, JOBS_PATH, PLANS_PATH, REQUESTS_PATH
from service.domain.errors import Overloaded

Work = Literal["reads", "writes", "judgements", "transfers", "streams"]
TRANSFERS = {  # which move a file to the storage or from it: where that hangs, nothing else shall
    ("POST", FILES_PATH),
    ("GET", f"{JOBS_PATH}/{{job_id}}/report"),
    ("GET", f"{JOBS_PATH}/{{job_id}}/artifacts/{{artifact_id}}/content"),
}
JUDGEMENTS = {  # which read whole sets, or the storage, for seconds: no cancel, denial or revocation of a key shall wait for them
    ("POST", JOBS_PATH),
    ("POST", f"{JOBS_PATH}/{{job_id}}/reverify"),
    ("POST", REQUESTS_PATH),
    ("POST", f"{REQUESTS_PATH}/batch"),
    ("PUT", f"{PLANS_PATH}/{{model}}"),
    ("POST", BENCHMARKS_PATH),
    ("DELETE", f"{BENCHMARKS_PATH}/{{name}}"),
    ("DELETE", f"{FILES_PATH}/{{file_id}}"),
}


class ConcurrencyLimit:
    """At most `running` at once; `waiting` more wait, in the order in which they came, for `wait_s` seconds at most."""

    def __init__(self, running: int, waiting: int, wait_s: float) -> None:
        self.running, self.waiting, self.wait_s = running, waiting, wait_s
        self._slots = anyio.Semaphore(running)

    def check(self) -> None:
        """Raises Overloaded where the queue is full."""
        if self._slots.statistics().tasks_waiting >= self.waiting:
            raise Overloaded(f"{self.running} requests of this kind are being carried out, and {self.waiting} wait")

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Raises Overloaded where the queue is full, or where waiting took too long."""
        self.check()
        try:
            with anyio.fail_after(self.wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise Overloaded(f"this request waited for {self.wait_s:g} s, and has not been begun") from None
        try:
            yield
        finally:
            self._slots.release()


def limits() -> dict[Work, ConcurrencyLimit]:
    """Of one process. Together they leave connections and threads to /readyz, /metrics and quotas.

    A transfer is kept waiting longer: of an upload that waits all has been sent already.
    """
    return {
        "reads": ConcurrencyLimit(6, 100, 1.0),
        "writes": ConcurrencyLimit(3, 100, 1.0),
        "judgements": ConcurrencyLimit(5, 100, 1.0),
        "transfers": ConcurrencyLimit(4, 16, 10.0),
        "streams": ConcurrencyLimit(
            2, 100, 1.0
        ),  # each open one looks once a second: no reader shall wait behind hundreds
    }


def limit_of(request: Request) -> ConcurrencyLimit | None:
    """None: the endpoint is not limited as a whole."""
    route = request.scope["route"]
    if iscoroutinefunction(route.endpoint):
        return None
    found: dict[Work, ConcurrencyLimit] = request.app.state.concurrency
    if (request.method, route.path) in TRANSFERS:
        return found["transfers"]
    if (request.method, route.path) in JUDGEMENTS:
        return found["judgements"]
    return found["reads" if request.method == "GET" else "writes"]


async def slot(request: Request) -> AsyncIterator[None]:
    """A dependency of every route: its slot while the endpoint runs."""
    limit = limit_of(request)
    if limit is None:
        yield
    else:
        async with limit.slot():
            yield
