"""Load shedding: how many requests are carried out at once, how many wait for that, and which are refused with 503.

Threads and connections of the database are few. A request takes its slot when its body is there, and gives it back
before its answer is sent: whoever sends or reads slowly keeps none. An `async def` endpoint takes none; what it does in
a thread it limits itself.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from inspect import iscoroutinefunction
from typing import Literal

import anyio
from fastapi import Request
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.api.shapes import BENCHMARKS_PATH, FILES_PATH, JOBS_PATH, PLANS_PATH, REQUESTS_PATH
from service.domain.errors import Overloaded

# A large body holds a slot from its first byte until its request is answered, and its request takes one more to be carried out.
Work = Literal["reads", "writes", "judgements", "transfers", "streams", "large_bodies"]
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
        self.refused = 0  # requests, so far
        self._slots = anyio.Semaphore(running)

    @property
    def running_now(self) -> int:
        return self.running - self._slots.value

    @property
    def waiting_now(self) -> int:
        return self._slots.statistics().tasks_waiting

    def check(self) -> None:
        """Raises Overloaded where the queue is full."""
        if self.waiting_now >= self.waiting:
            self.refused += 1
            raise Overloaded(f"{self.running} requests of this kind are being carried out, and {self.waiting} wait")

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Raises Overloaded where the queue is full, or where waiting took too long."""
        self.check()
        try:
            with anyio.fail_after(self.wait_s):
                await self._slots.acquire()
        except TimeoutError:
            self.refused += 1
            raise Overloaded(f"this request waited for {self.wait_s:g} s, and has not been begun") from None
        try:
            yield
        finally:
            self._slots.release()


def limits() -> dict[Work, ConcurrencyLimit]:
    """Of one process. Those that hold connections and threads leave some to /readyz, /metrics and quotas.

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
        "large_bodies": ConcurrencyLimit(32, 32, 1.0),  # these hold memory, and neither threads nor connections
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


class ConcurrencyFigures(Collector):
    """How full each limit of this process is, and how many requests it has refused."""

    def __init__(self, limits: Mapping[Work, ConcurrencyLimit]) -> None:
        self._limits = limits

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        slots = GaugeMetricFamily("unlearn_http_slots", "Requests that may be carried out at once", labels=["work"])
        running = GaugeMetricFamily(
            "unlearn_http_slots_used", "Requests that are being carried out, or bodies that arrive", labels=["work"]
        )
        waiting = GaugeMetricFamily("unlearn_http_waiting_requests", "Requests that wait for a slot", labels=["work"])
        refused = CounterMetricFamily(
            "unlearn_http_refused_requests", "Requests refused with 503 for want of a slot", labels=["work"]
        )
        for work, limit in self._limits.items():
            slots.add_metric([work], limit.running)
            running.add_metric([work], limit.running_now)
            waiting.add_metric([work], limit.waiting_now)
            refused.add_metric([work], limit.refused)
        yield from (slots, running, waiting, refused)
