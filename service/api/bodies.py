"""JSON bodies: bounded before they are parsed, parsed and digested in a thread of their own where they are large.

A thread does not help alone: the interpreter parses a body in one call, and all other requests wait for its end. What bounds
their wait is the number of values. What bounds the memory is the number of large bodies that arrive, are parsed, or belong to
a request that is carried out.
"""

import json
from collections.abc import Callable
from itertools import accumulate
from typing import Any, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.api.deps import media_type
from service.api.shapes import FILES_PATH

VALUES_MAX = 200_000  # with the names of members: as in a batch of 40,000 rows. At worst they take 0.1 to 0.2 s
DEPTH_MAX = 64
DIGITS_MAX = 100  # of an integer; to read one takes time in proportion to their square
SMALL_BYTES = 2**16  # parsed within a millisecond or few, wherever it is
BOUNDS = (  # as the OpenAPI document has them
    f"Content Too Large: the body has more bytes than the deployment allows (8 MiB by default), more than {VALUES_MAX:,} values "
    f"and names of members, a nesting deeper than {DEPTH_MAX}, or an integer of more than {DIGITS_MAX} digits"
)
STRUCTURE = b",:[]{}"
DROPPED = bytes(set(range(256)) - set(STRUCTURE))
STEPS = {ord(b"["): 1, ord(b"{"): 1, ord(b"]"): -1, ord(b"}"): -1}

T = TypeVar("T")


def install(app: FastAPI) -> None:
    app.state.parsing = CapacityLimiter(1)


class JsonRequest(Request):
    """A request whose `json()` refuses, with 413, what would take long to parse."""

    async def json(self) -> Any:
        return await in_thread_if_large(self, parse, await self.body())


async def in_thread_if_large(request: Request, function: Callable[[bytes], T], body: bytes) -> T:
    """function(body), computed in a thread where the body is large, for one request at a time."""
    if len(body) <= SMALL_BYTES:
        return function(body)
    return await run_sync(function, body, limiter=request.app.state.parsing)


def is_large(request: Request) -> bool:
    """Whether its body, which may take much memory, is still to come: by its length, or because none is announced."""
    if is_upload(request.scope, request.headers):
        return False
    length = request.headers.get("content-length", "0")
    return "transfer-encoding" in request.headers or not length.isdecimal() or int(length) > SMALL_BYTES


def is_upload(scope: Scope, headers: Headers) -> bool:
    """Whether the body is a form whose file goes to the disk as it arrives. Any other form is read into memory."""
    return (scope["method"], scope["path"]) == ("POST", FILES_PATH) and media_type(headers) == "multipart/form-data"


def parse(body: bytes) -> Any:
    """Raises HTTPException, 413, for a body beyond the bounds, and ValueError for one that is not JSON in UTF-8."""
    judge(body)
    return json.loads(body.decode("utf-8-sig", "surrogatepass"), parse_int=_integer)


def judge(body: bytes) -> None:
    """Raises HTTPException, 413, for too many values or too deep a nesting. Of 8 MiB it takes 10 to 50 ms.

    Counts the commas, colons and brackets outside of strings. What of a body that is not JSON would be parsed before the first
    error is counted, too.

    >>> judge(b'{"a": ["[[[[", "\\\\\\\\", "\\\\"[[["]}')
    >>> judge(b"[" * 65)
    Traceback (most recent call last):
    starlette.exceptions.HTTPException: 413: the body is nested deeper than 64
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') // 2 > VALUES_MAX:  # as many strings
        raise _too_many()
    structure = b"".join(unescaped.split(b'"')[::2]).translate(None, DROPPED)
    brackets = structure.translate(None, b",:")
    if len(structure) - brackets.count(b"]") - brackets.count(b"}") >= VALUES_MAX:
        raise _too_many()
    if max(accumulate(map(STEPS.__getitem__, brackets)), default=0) > DEPTH_MAX:
        raise HTTPException(413, f"the body is nested deeper than {DEPTH_MAX}")


def _too_many() -> HTTPException:
    return HTTPException(413, f"the body has more than {VALUES_MAX} values and names")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS_MAX:
        raise HTTPException(413, f"the body has an integer of more than {DIGITS_MAX} digits")
    return int(digits)
