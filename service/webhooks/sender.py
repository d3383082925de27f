"""One attempt to deliver: at most so many seconds and so many bytes, to the address that the guard decided on.

All of it is under one deadline, which timeouts of single reads are not: a server that sends a byte now and then would
keep us for ever. Hence asyncio, where a deadline cancels whatever is being waited for.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from threading import Thread
from time import monotonic
from typing import NamedTuple

import httpx

from service.webhooks import guard

TIMEOUT_S = 15.0
REPLY_MAX_BYTES = 1000
RETRY_AFTER_MAX_S = 86_400.0
HTTP_DATE = "%a, %d %b %Y %H:%M:%S GMT"
FIXED_HEADERS = {
    "content-type": "application/json",
    "user-agent": "unlearning-service",
    "accept-encoding": "identity",
    "connection": "close",
}


class Delivery(NamedTuple):
    """What is known of an attempt."""

    status: int | None  # None: no answer came
    latency_ms: int  # name resolution included
    reply: str  # at most 1000 characters; what is not UTF-8, and NUL, which Postgres does not store, is replaced
    error: str | None  # a sentence for the endpoint's owner; None: delivered
    retry_after_s: float | None  # 0 to a day; None: a success, or the answer does not say
    disables: bool  # the endpoint answered that it is gone


def deliver(
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    rules: guard.Rules,
    tls: ssl.SSLContext,
    resolve: guard.Resolver = socket.getaddrinfo,
    timeout_s: float = TIMEOUT_S,
) -> Delivery:
    """POST it once, following neither redirects nor proxies; whatever the other side does is told in the result.

    tls: whom to trust, as httpx.create_ssl_context() makes it; the certificate must be for the URL's host name.
    Blocks, and not within an event loop: it runs one.
    """
    began = monotonic()
    try:
        target = _within(timeout_s, partial(guard.pin, url, rules, resolve))
        left_s = timeout_s - (monotonic() - began)
        response, reply = asyncio.run(_post(_request(target, headers, body), tls, left_s))
    except (guard.AddressRefused, TimeoutError, httpx.TransportError) as failure:
        return Delivery(None, _ms_since(began), "", _why(failure, timeout_s), None, disables=False)
    status, delivered = response.status_code, response.is_success
    return Delivery(
        status,
        _ms_since(began),
        reply.decode(errors="replace").replace("\0", "\ufffd"),
        None if delivered else f"answered {status}" + (", and is not redirected" if response.is_redirect else ""),
        None if delivered else _retry_after_s(response.headers.get("retry-after", ""), datetime.now(UTC)),
        disables=status == HTTPStatus.GONE,
    )


def _ms_since(began: float) -> int:
    return round(1000 * (monotonic() - began))


def _within(timeout_s: float, pin: Callable[[], guard.Target]) -> guard.Target:
    """getaddrinfo knows no timeout and cannot be stopped, so it is left behind; the resolver's own limits end it."""
    future = Future[guard.Target]()

    def work() -> None:
        try:
            future.set_result(pin())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, name="resolve", daemon=True).start()
    return future.result(timeout_s)


def _request(target: guard.Target, headers: Mapping[str, str], body: bytes) -> httpx.Request:
    """To the address, in the name of the host: for the server (Host), and for TLS, which checks the certificate by it."""
    host = target.url.raw_host.decode("ascii")
    return httpx.Request(
        "POST",
        target.url.copy_with(host=target.address),
        headers={**headers, **FIXED_HEADERS, "host": target.url.netloc.decode("ascii")},
        content=body,
        extensions={"sni_hostname": host},
    )


async def _post(request: httpx.Request, tls: ssl.SSLContext, timeout_s: float) -> tuple[httpx.Response, bytes]:
    """The transport itself: a client would follow the environment's proxies and log the URL. Once the status is there
    the message has arrived, or has not; that the rest is slow or broken changes nothing."""
    response, reply = None, b""
    try:
        async with asyncio.timeout(timeout_s), httpx.AsyncHTTPTransport(verify=tls, trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            async for part in response.aiter_raw():  # raw: a small answer may unpack to a large one
                reply += part
                if len(reply) >= REPLY_MAX_BYTES:
                    break
    except (TimeoutError, httpx.TransportError):
        if response is None:
            raise
    return response, reply[:REPLY_MAX_BYTES]


def _why(failure: Exception, timeout_s: float) -> str:
    if isinstance(failure, guard.AddressRefused):
        return str(failure)
    if isinstance(failure, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    cause: BaseException | None = failure
    while cause:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted: {cause.verify_message}"
        cause = cause.__cause__ or cause.__context__
    return "no connection" if isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout) else "no answer in HTTP"


def _retry_after_s(value: str, now: datetime) -> float | None:
    """RFC 9110, 10.2.3: seconds, or a date in the one form that servers may send. A day at most: an endpoint cannot put
    us off for ever."""
    if re.fullmatch(r"[0-9]{1,18}", value):
        return min(float(value), RETRY_AFTER_MAX_S)
    try:
        date = datetime.strptime(value, HTTP_DATE).replace(tzinfo=UTC)
    except ValueError:
        return None
    return min(max((date - now).total_seconds(), 0.0), RETRY_AFTER_MAX_S)
