"""The headers of answers, written into the OpenAPI document: which answer has which, read off what it says already."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

TAGGED = ("JobObject", "DeletionRequestObject")  # whose ETag comes with every answer, for If-Match


class Header(NamedTuple):
    what: str
    schema: Mapping[str, Any] = {"type": "string"}
    always: bool = False  # with each answer that has it in the document


HEADERS: Mapping[str, Header] = {
    "X-Request-ID": Header(
        "the request's own, if it fits, else a new one; the log has it",
        {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
        always=True,
    ),
    "RateLimit": Header("what is left of each quota (r), and when more is (t, seconds); not where there is no limit"),
    "RateLimit-Policy": Header("each quota (q) and its window (w, seconds); not where there is no limit"),
    "Retry-After": Header(
        "seconds after which to ask again; of a job: until it has ended", {"type": "integer", "minimum": 0}
    ),
    "ETag": Header("for If-None-Match or If-Match", {"type": "string", "pattern": '^"[^"]+"$'}, always=True),
    "ETag-of-JSON": Header("for If-None-Match; only if the answer is JSON", {"type": "string"}),
    "Location": Header("of what was made", {"type": "string", "format": "uri-reference"}, always=True),
    "Link": Header('rel="next", or rel="prev" of a page before another; not with the last page (RFC 8288)'),
    "Idempotent-Replayed": Header(
        "the same was asked with this Idempotency-Key, and this was the answer", {"type": "string", "const": "true"}
    ),
    "Preference-Applied": Header("how long a change was waited for: what Prefer asked, or less"),
    "WWW-Authenticate": Header("how to say who asks", {"type": "string", "const": "Bearer"}, always=True),
    "Repr-Digest": Header("SHA-256 of the whole (RFC 9530)", always=True),
    "Content-Digest": Header("SHA-256 of what is sent (RFC 9530)", always=True),
    "Accept-Ranges": Header("in which units parts can be had", {"type": "string", "const": "bytes"}, always=True),
    "Content-Range": Header("which part of how much", always=True),
}


def declare(openapi: dict[str, Any]) -> None:
    """In place, once errors and parameters are declared."""
    openapi["components"]["headers"] = {
        name: {"description": header.what, "schema": dict(header.schema), "required": header.always}
        for name, header in HEADERS.items()
    }
    for path in openapi["paths"].values():
        for operation in path.values():
            for status, answer in operation["responses"].items():
                answer["headers"] = {
                    name.removesuffix("-of-JSON"): {"$ref": f"#/components/headers/{name}"}
                    for name in _told(operation, int(status), answer)
                }


def _told(operation: Mapping[str, Any], status: int, answer: Mapping[str, Any]) -> Iterator[str]:
    heard = {parameter["name"] for parameter in operation.get("parameters", ())}
    types = answer.get("content", {})
    shown = types.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    yield "X-Request-ID"
    if "security" in operation and (status < 400 or status == 429):
        yield from ("RateLimit", "RateLimit-Policy")
    match status:
        case 401:
            yield "WWW-Authenticate"
        case 409 if "Idempotency-Key" in heard:
            yield "Retry-After"
        case 416:
            yield "Content-Range"
        case 429:
            yield "Retry-After"
        case 503 if "application/problem+json" in types:
            yield "Retry-After"
    if status < 400:
        yield from _of_success(heard, status, types, shown)


def _of_success(heard: set[str], status: int, types: Mapping[str, Any], shown: str) -> Iterator[str]:
    if status == 201:
        yield "Location"
    if "Idempotency-Key" in heard and status != 304:
        yield "Idempotent-Replayed"
    if "If-None-Match" in heard and status != 204:
        yield "ETag" if len(types) < 2 or shown == "Report" else "ETag-of-JSON"
    elif shown in TAGGED:
        yield "ETag"
    if shown == "JobObject" or "Prefer" in heard:
        yield "Retry-After"
    if "Prefer" in heard:
        yield "Preference-Applied"
    if {"after", "before"} <= heard and status == 200:
        yield "Link"
    if ("Range" in heard or shown == "Report") and status != 304:
        yield from ("Repr-Digest", "Accept-Ranges", "Content-Digest" if status == 200 else "Content-Range")
