"""Errors as problem+json (RFC 9457). The one place that knows which error has which status code."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from http import HTTPStatus
from typing import Any, NamedTuple

import sqlalchemy.exc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service.domain.errors import (
    FieldProblem,
    InvalidRequest,
    InvalidTransition,
    NotFound,
    NotReady,
    StorageFull,
    StorageUnavailable,
    TooLarge,
    UnlearnError,
)

MEDIA_TYPE = "application/problem+json"
NAMED = 3  # in the words of `detail`
ERRORS_MAX = 100  # a thousand inline rows of the wrong kind are a thousand errors
POINTER_MAX = 200
DETAIL_MAX = 1000
RETRY_AFTER_S = "5"


class Kind(NamedTuple):
    status: int
    name: str
    title: str


KINDS = (
    MALFORMED_JSON := Kind(400, "malformed-json", "The body is not JSON"),
    MALFORMED_BODY := Kind(400, "malformed-body", "The body cannot be read"),
    NOT_FOUND := Kind(404, "not-found", "There is no such thing"),
    METHOD_NOT_ALLOWED := Kind(405, "method-not-allowed", "The path does not have this method"),
    NOT_ACCEPTABLE := Kind(406, "not-acceptable", "None of the accepted media types can be given"),
    INVALID_TRANSITION := Kind(409, "invalid-transition", "The present state does not allow it"),
    NOT_READY := Kind(409, "not-ready", "It does not exist yet"),
    PAYLOAD_TOO_LARGE := Kind(413, "payload-too-large", "The body is over the limit"),
    UNSUPPORTED_MEDIA_TYPE := Kind(415, "unsupported-media-type", "The body has a media type that is not read here"),
    RANGE_NOT_SATISFIABLE := Kind(416, "range-not-satisfiable", "The range lies outside the content"),
    VALIDATION_ERROR := Kind(422, "validation-error", "The request cannot be carried out as written"),
    INTERNAL_ERROR := Kind(500, "internal-error", "The service failed"),
    SERVICE_UNAVAILABLE := Kind(503, "service-unavailable", "Something that the service needs does not answer"),
    STORAGE_FULL := Kind(507, "storage-full", "The storage takes no more"),
)
OF_STATUS = {kind.status: kind for kind in reversed(KINDS)}  # the first of a status stands for it
OF_ERROR: Mapping[type[Exception], Kind] = {
    NotFound: NOT_FOUND,
    InvalidTransition: INVALID_TRANSITION,
    NotReady: NOT_READY,
    TooLarge: PAYLOAD_TOO_LARGE,
    StorageFull: STORAGE_FULL,
    StorageUnavailable: SERVICE_UNAVAILABLE,
}
DATABASE_DOWN = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.TimeoutError,  # no connection became free
)


class ProblemError(BaseModel):
    pointer: str  # into the request's body (RFC 6901); "" for the whole, or for a parameter that `detail` names
    detail: str
    code: str


class Problem(BaseModel):
    """RFC 9457. `type` is a link to the list of problems."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[ProblemError] = []


def install(app: FastAPI) -> None:
    app.add_exception_handler(UnlearnError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    for error in DATABASE_DOWN:
        app.add_exception_handler(error, _database_down)


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route: 422 and 500 are there anyway."""
    return {status: {"description": HTTPStatus(status).phrase} for status in sorted({*statuses, 422, 500})}


def problem(
    scope: Mapping[str, Any],
    kind: Kind,
    detail: str,
    errors: Iterable[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    body = Problem(
        type=f"/docs#{kind.name}",
        title=kind.title,
        status=kind.status,
        detail=_plain(detail),
        instance=_plain(scope["path"]),
        request_id=scope["state"]["request_id"],
        errors=[
            ProblemError(pointer=_plain(pointer[:POINTER_MAX]), detail=_plain(words[:DETAIL_MAX]), code=code)
            for pointer, words, code in errors
        ],
    )
    content = body.model_dump(exclude=None if body.errors else {"errors"})
    retry = {"Retry-After": RETRY_AFTER_S} if kind.status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return JSONResponse(content, kind.status, headers={**retry, **(headers or {})}, media_type=MEDIA_TYPE)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, InvalidRequest):
        return _refused(request, error.problems)
    kind = next((OF_ERROR[cls] for cls in type(error).__mro__ if cls in OF_ERROR), INTERNAL_ERROR)
    return problem(request.scope, kind, str(error))


async def _http(request: Request, error: Exception) -> JSONResponse:
    """What the framework raises: no route, no method, a body that it cannot read."""
    assert isinstance(error, HTTPException)
    kind = OF_STATUS.get(error.status_code, INTERNAL_ERROR)
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in (ENOSPC, EDQUOT):
        return problem(request.scope, STORAGE_FULL, "no room to receive the body")
    if kind is MALFORMED_JSON and "json" not in request.headers.get("content-type", ""):
        kind = MALFORMED_BODY
    return problem(request.scope, kind, str(error.detail), headers=error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    syntax = next((item for item in found if item["type"] == "json_invalid"), None)
    if syntax is not None:
        detail = f"{syntax['ctx']['error']} at character {syntax['loc'][-1]}"
        return problem(request.scope, MALFORMED_JSON, detail)
    return _refused(request, [_field_problem(item, error.body) for item in found])


def _refused(request: Request, problems: Sequence[FieldProblem]) -> JSONResponse:
    named = [f"{item.pointer[:POINTER_MAX]} {item.detail[:DETAIL_MAX]}".strip() for item in problems[:NAMED]]
    more = [f"and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
    return problem(request.scope, VALIDATION_ERROR, "; ".join(named + more), problems[:ERRORS_MAX])


async def _database_down(request: Request, error: Exception) -> JSONResponse:
    return problem(request.scope, SERVICE_UNAVAILABLE, "the database does not answer")


def _field_problem(item: Mapping[str, Any], body: Any) -> FieldProblem:
    message = str(item["msg"]).removeprefix("Value error, ")
    where, *path = item["loc"]
    if where == "body":
        missing = path.pop() if item["type"] == "missing" and path else None
        steps = _present(path, body) + ([missing] if missing is not None else [])
        return FieldProblem("".join(map(escaped, steps)), message, item["type"])
    return FieldProblem("", f"{'.'.join(map(str, path))}: {message}", item["type"])


def _present(path: list[Any], body: Any) -> list[Any]:
    """The path without the branches of unions, which pydantic names and the body does not have."""
    steps, here = [], body
    for step in path:
        with suppress(KeyError, IndexError, TypeError):
            here = here[step]
            steps.append(step)
    return steps


def _plain(text: str) -> str:
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    return text.encode(errors="replace").decode()


def escaped(step: Any) -> str:
    """One step of a pointer (RFC 6901)."""
    return "/" + str(step).replace("~", "~0").replace("/", "~1")


def declare(openapi: dict[str, Any]) -> None:
    """Writes the Problem into an OpenAPI document, as the body of every error that has none of its own."""
    schemas = openapi["components"]["schemas"]
    for framework in ("HTTPValidationError", "ValidationError"):
        schemas.pop(framework, None)
    definition = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= definition.pop("$defs") | {"Problem": definition}
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for operation in (operation for path in openapi["paths"].values() for operation in path.values()):
        for status, answer in operation["responses"].items():
            if int(status) >= HTTPStatus.BAD_REQUEST and (status == "422" or "content" not in answer):
                answer["content"] = content
