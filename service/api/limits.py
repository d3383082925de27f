"""How much one may ask for: quotas by who asks, counted in the broker's Redis, which all processes of the API share.

The headers are those of draft-ietf-httpapi-ratelimit-headers-10. What is counted against is the principal that the
credentials prove, or the address that the connection comes from: never what a client writes into a header.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from typing import NamedTuple, TypeVar

import structlog
from anyio.to_thread import run_sync
from fastapi import Request
from limits import RateLimitItemPerSecond
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, storage_from_string
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import State

from service.domain.errors import QuotaExceeded
from service.domain.identity import Principal
from service.settings import Settings

T = TypeVar("T")

PREFIX = "unlearn-limits"  # of the keys in Redis
TIMEOUT_S = 0.5
AWAY_S = 10.0  # for which nobody asks a Redis that did not answer
STREAM_RETRY_S = 10

log = structlog.get_logger(__name__)


class Policy(NamedTuple):
    name: str
    quota: int  # 0: no limit
    window_s: int

    @property
    def item(self) -> RateLimitItemPerSecond:
        return RateLimitItemPerSecond(self.quota, self.window_s, namespace=self.name)


class Limiter:
    """Counts in Redis; while that is away, in this process alone."""

    def __init__(self, settings: Settings) -> None:
        self.default = Policy("default", settings.rate_limit_per_minute, 60)
        self.jobs = Policy("jobs", settings.rate_limit_jobs_per_hour, 3600)
        self.failures = Policy("failures", settings.rate_limit_failures_per_minute, 60)
        self._own = MovingWindowRateLimiter(MemoryStorage())
        self._shared = _shared(settings.broker_url) or self._own
        self._away_until = 0.0
        self._streams_max = settings.events_streams_per_principal
        self._streams = Counter[str]()

    async def count(self, state: State, policy: Policy, whose: str) -> None:
        """One more, told in the headers of the answer. Raises QuotaExceeded; then it is not counted."""
        if policy.quota:
            await run_sync(self._count, state, policy, whose)

    def _count(self, state: State, policy: Policy, whose: str) -> None:
        taken = self._ask(lambda limiter: limiter.hit(policy.item, whose))
        left = self._tell(state, policy, whose)
        if not taken:
            raise _exceeded(policy, left)

    @contextmanager
    def stream(self, whose: str) -> Iterator[None]:
        """One that stays open, from the event loop. Raises QuotaExceeded."""
        if self._streams_max and self._streams[whose] >= self._streams_max:
            raise QuotaExceeded("streams", f"{self._streams_max} streams are open; close one first", STREAM_RETRY_S)
        self._streams[whose] += 1
        try:
            yield
        finally:
            self._streams[whose] -= 1
            if not self._streams[whose]:
                del self._streams[whose]

    def _tell(self, state: State, policy: Policy, whose: str) -> int:
        """Adds the policy to the headers. Seconds until more may be asked for."""
        stats = self._ask(lambda limiter: limiter.get_window_stats(policy.item, whose))
        wait_s = min(policy.window_s, max(1, math.ceil(stats.reset_time - time.time())))
        quota, rest = f"q={policy.quota};w={policy.window_s}", f"r={max(0, stats.remaining)};t={wait_s}"
        for header, values in (("RateLimit-Policy", quota), ("RateLimit", rest)):
            told = state.headers.get(header)
            state.headers[header] = (f"{told}, " if told else "") + f'"{policy.name}";{values}'
        return wait_s

    def _ask(self, question: Callable[[MovingWindowRateLimiter], T]) -> T:
        if time.monotonic() >= self._away_until:
            try:
                return question(self._shared)
            except StorageError as error:
                self._away_until = time.monotonic() + AWAY_S
                log.warning("quotas are counted in this process alone for a while", error=error)
        return question(self._own)


async def count_job(request: Request) -> None:
    """A dependency of routes that create jobs."""
    limiter: Limiter = request.app.state.limiter
    await limiter.count(request.state, limiter.jobs, of(request.state.principal))


def of(who: Principal) -> str:
    return f"{who.tenant} {who.id}"


def network(request: Request) -> str:
    """Where the connection comes from. Of IPv6 the first 64 bits: the rest are its owner's to choose."""
    host = request.client.host if request.client else "unknown"
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return str(ip_network((address, 64), strict=False)) if address.version == 6 else host


def _exceeded(policy: Policy, wait_s: int) -> QuotaExceeded:
    detail = f"{policy.quota} in {policy.window_s} s are allowed; ask again in {wait_s} s"
    return QuotaExceeded(policy.name, detail, wait_s)


def _shared(broker_url: str) -> MovingWindowRateLimiter | None:
    options = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    try:
        storage = storage_from_string(broker_url, wrap_exceptions=True, key_prefix=PREFIX, **options)
    except ConfigurationError:
        log.warning("quotas are counted in this process alone: the broker is not one that can count")
        return None
    return MovingWindowRateLimiter(storage)
