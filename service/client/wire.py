"""Requests and answers: what is tried again, pages, downloads, problems as one exception."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx

from service.client.shapes import Json
from service.domain.errors import FieldProblem, UnlearnError

TRIES = 3
WAIT_S = 0.3  # before the second try; twice as long before the third
PATIENCE_S = 60.0  # who is told to wait longer is told so instead
SILENCE_S = 2.0  # a longer wait is logged
PAGE = 100
REPEATABLE = ("GET", "PUT", "DELETE")  # and what has an Idempotency-Key
BROKEN = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
KEY = "Idempotency-Key"

log = logging.getLogger(__name__)


class ApiError(UnlearnError):
    """A problem (RFC 9457). Its text is for people: title, status, and a line for each fault of the request, or the detail."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.type = str(problem.get("type", "about:blank"))
        self.detail = str(problem.get("detail", ""))
        self.errors = tuple(
            FieldProblem(one["pointer"], one["detail"], one["code"]) for one in problem.get("errors", ())
        )
        self.request_id: str | None = problem.get("request_id")
        self.raw = dict(problem)
        title = f"{problem.get('title')} ({status})"
        faults = [f"  {one.pointer}: {one.detail}" if one.pointer else f"  {one.detail}" for one in self.errors]
        self.lines = (title, *faults) if faults else (f"{title}: {self.detail}",)
        super().__init__("\n".join(self.lines))


class Wire:
    """Raises ApiError for an answer that is a problem, httpx.TransportError where there is no answer."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def json(self, method: str, path: str, body: object = None, **options: Any) -> Json:
        """The body of the answer; {} where there is none.

        `body` goes out in Python's JSON, in which a number that is not finite reaches the service, which refuses it by
        name. `options`: those of httpx.Client.build_request.
        """
        headers = options.pop("headers", {})
        if body is not None:
            options["content"] = json.dumps(body)
            headers = {**headers, "Content-Type": "application/json"}
        with self.opened(method, path, headers=headers, **options) as reply:
            reply.read()
            return _object(reply) if reply.content else {}

    def pages(self, path: str, asked: Mapping[str, Any]) -> Iterator[Json]:
        """Each object of a list, page after page."""
        return _each(lambda page: self.json("GET", path, params=page), asked)

    def found(self, path: str, asked: Mapping[str, Any]) -> Iterator[Json]:
        """The same of a search, which is a POST: what is looked for does not lie in a URL."""
        return _each(lambda page: self.json("POST", path, page), asked)

    def save(self, path: str, out: Path, accept: str = "*/*", sha256: str | None = None) -> None:
        """The answer's bytes as a file: whole, and of that digest where one is given, or not at all."""
        if not out.parent.is_dir():
            raise UnlearnError(f"there is no folder {out.parent} to write {out.name} into")
        part, digest = out.with_name(f"{out.name}.part"), hashlib.sha256()
        headers = {"Accept": f"{accept}, application/problem+json"}
        try:
            with self.opened("GET", path, headers=headers) as reply, part.open("wb") as file:
                for chunk in reply.iter_bytes():
                    file.write(chunk)
                    digest.update(chunk)
            if sha256 not in (None, digest.hexdigest()):
                raise UnlearnError(f"{path} has other bytes than its digest says")
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def opened(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """The answer once it has begun."""
        reply = self._sent(self._http.build_request(method, path, **options))
        try:
            if not reply.is_success:
                reply.read()
                raise ApiError(reply.status_code, _object(reply))
            yield reply
        finally:
            reply.close()

    def _sent(self, request: httpx.Request) -> httpx.Response:
        """What can be repeated is tried again where the connection breaks, and where the service asks for it."""
        tries = TRIES if request.method in REPEATABLE or KEY in request.headers else 1
        for number in range(1, tries + 1):
            pause_s = WAIT_S * 2 ** (number - 1)
            try:
                reply = self._http.send(request, stream=True)
            except BROKEN:
                if number == tries:
                    raise
            else:
                if number == tries or not _comes_again(reply):
                    return reply
                told_s = _retry_after_s(reply)
                if told_s is not None and told_s > PATIENCE_S:
                    return reply
                pause_s = pause_s if told_s is None else told_s
                reply.close()
                if pause_s > SILENCE_S:
                    log.warning("the service answers %d and asks to wait: again in %g s", reply.status_code, pause_s)
            sleep(pause_s)
        raise AssertionError("the last try returns or raises")


def _each(ask: Callable[[Json], Json], asked: Mapping[str, Any]) -> Iterator[Json]:
    given = {name: value for name, value in asked.items() if value is not None}
    after: Json = {}
    while True:
        page = ask({"limit": PAGE, **given, **after})
        yield from page["data"]
        if not page["has_more"]:
            return
        after = {"after": page["last_id"]}


def _comes_again(reply: httpx.Response) -> bool:
    """409 with Retry-After: the first try of the same request, whose connection broke, is still being answered."""
    in_flight = reply.status_code == httpx.codes.CONFLICT and "retry-after" in reply.headers
    return in_flight or reply.status_code in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)


def _retry_after_s(reply: httpx.Response) -> float | None:
    """Seconds; None: not told, or as a date, as a proxy may."""
    told = reply.headers.get("retry-after", "")
    return float(told) if told.isdecimal() else None


def _object(reply: httpx.Response) -> Json:
    try:
        body = reply.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UnlearnError(f"{reply.url} answered {reply.status_code}, and not with a JSON object")
    return body


def at(path: str, *parts: str) -> str:
    """A path below another; what a URL takes for its own, it does not take from a part.

    Raises UnlearnError for a part that is empty: the path would be another's.
    """
    if not all(parts):
        raise UnlearnError("an id or a name is empty")
    return "/".join([path, *(quote(part, safe="") for part in parts)])


def once(key: str | None = None) -> dict[str, str]:
    """The header by which what is sent again is carried out once; default: a key that nobody has."""
    return {KEY: f'"{key or uuid4()}"'}


def if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}
