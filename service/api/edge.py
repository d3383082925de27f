"""The outermost layer: the request's id, its limits, its figures, the headers of every answer, the last net for errors."""

import re
import time
from contextlib import suppress

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from service.api.bodies import is_upload
from service.api.errors import INTERNAL_ERROR, problem
from service.settings import Settings
from service.store.ids import new_id

log = structlog.get_logger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MULTIPART_OVERHEAD_BYTES = 2**16  # boundaries, part headers and the short fields around a file
PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # every few seconds each
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-cache",
    "Vary": "Accept, Authorization",
}


class _HeadersSent(Exception):
    """All that a HEAD asks for: what would write the body is not to read on."""


class HttpFigures:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "unlearn_http_requests", "Requests answered", ["method", "route", "code"], registry=registry
        )
        self.duration = Histogram(
            "unlearn_http_request_duration_seconds",
            "From the request's head to the end of the answer",
            ["method", "route"],
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
            registry=registry,
        )
        self.in_flight = Gauge("unlearn_http_in_flight_requests", "Requests being answered", registry=registry)


class Edge:
    def __init__(self, app: ASGIApp, settings: Settings, figures: HttpFigures) -> None:
        self.app = app
        self.settings = settings
        self.figures = figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = new_id("req")
        added: dict[str, str] = {}  # to the answer, whatever it will be
        scope.setdefault("state", {}).update(request_id=request_id, headers=added)
        head = scope["method"] == "HEAD"
        asked = (
            {**scope, "method": "GET"} if head else scope
        )  # RFC 9110, section 9.3.2: the answer to a GET, without body
        code = 0

        async def answer(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                sent = MutableHeaders(scope=message)
                sent["X-Request-ID"] = request_id
                sent.update(added)
                for name, value in HEADERS.items():
                    sent.setdefault(name, value)
            await send(message)
            if head and code:
                await send({"type": "http.response.body"})
                raise _HeadersSent
            if message["type"] == "http.response.body" and not message.get("more_body"):
                note()

        began, noted = time.perf_counter(), False

        def note() -> None:
            """Once: at the end of the answer, after which its background tasks run, or where there is none."""
            nonlocal noted
            if noted:
                return
            noted = True
            method = scope["method"] if scope["method"] in METHODS else "other"
            route, seconds = _route(asked), time.perf_counter() - began
            self.figures.in_flight.dec()
            self.figures.requests.labels(method, route, str(code)).inc()
            self.figures.duration.labels(method, route).observe(seconds)
            principal = getattr(scope["state"].get("principal"), "id", None)
            write = log.debug if route in PROBES else log.info
            write(
                "request",
                method=method,
                route=route,
                status=code,
                milliseconds=round(seconds * 1000, 1),
                principal=principal,
            )

        self.figures.in_flight.inc()
        with bound_contextvars(**_names(headers, request_id)):
            try:
                await self.app(asked, self._limited(scope, headers, receive), answer)
            except _HeadersSent:
                pass
            except Exception:
                log.exception("request failed", method=scope["method"], route=_route(asked))
                if code:  # half an answer is on its way: only breaking it off tells the client
                    raise
                failed = problem(scope, INTERNAL_ERROR, "The failure is logged under this request_id.")
                with suppress(_HeadersSent):
                    await failed(scope, receive, answer)
            finally:
                note()

    def _limited(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Counts what arrives, whatever Content-Length says."""
        limit = self.settings.body_max_bytes
        if is_upload(scope, headers):
            limit = self.settings.upload_max_bytes + MULTIPART_OVERHEAD_BYTES
        announced = headers.get("content-length", "0")
        received = int(announced) if announced.isdecimal() and int(announced) > limit else 0

        async def counted() -> Message:
            nonlocal received
            message = {"type": "http.request"} if received > limit else await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, f"the body has more than {limit} bytes")
            return message

        return counted


def _route(scope: Scope) -> str:
    """Its template: a path may have what a client was not to write there, and nobody is to read."""
    return getattr(scope.get("route"), "path", "unmatched")


def _names(headers: Headers, request_id: str) -> dict[str, str]:
    """What every line of the log says that is written for this request; the caller's trace too, if it has one (W3C)."""
    trace = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    return {"request_id": request_id} | ({"trace_id": trace["trace"]} if trace else {})
