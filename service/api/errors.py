"""Errors as problem+json (RFC 9457). The one place that knows which error has which status code."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from service.domain.errors import (
    FieldProblem,
    Forbidden,
    Gone,
    HubUnavailable,
    InvalidRequest,
    InvalidTransition,
    KeyInFlight,
    KeyReused,
    NotFound,
    NotReady,
    Overloaded,
    PreconditionFailed,
    ProviderUnavailable,
    QuotaExceeded,
    StorageFull,
    StorageUnavailable,
    TooLarge,
    Unauthenticated,
    UnlearnError,
)
from service.store.session import AWAY

MEDIA_TYPE = "application/problem+json"
IANA = "https://iana.org/assignments/http-problem-types"
NAMED = 3  # in the words of `detail`
ERRORS_MAX = 100  # a thousand inline rows of the wrong kind are a thousand errors
POINTER_MAX = 200
DETAIL_MAX = 1000
RETRY_AFTER_S = "5"


class Kind(NamedTuple):
    status: int
    name: str
    title: str
    registered: bool = False  # at IANA, under this name; the others are ours

    @property
    def uri(self) -> str:
        return f"{IANA if self.registered else '/docs'}#{self.name}"


KINDS = (
    MALFORMED_JSON := Kind(400, "malformed-json", "The body is not JSON"),
    MALFORMED_BODY := Kind(400, "malformed-body", "The body cannot be read"),
    UNAUTHENTICATED := Kind(401, "unauthenticated", "Nobody is known by these credentials"),
    INSUFFICIENT_SCOPE := Kind(403, "insufficient-scope", "The credentials do not allow it"),
    NOT_FOUND := Kind(404, "not-found", "There is no such thing"),
    METHOD_NOT_ALLOWED := Kind(405, "method-not-allowed", "The path does not have this method"),
    NOT_ACCEPTABLE := Kind(406, "not-acceptable", "None of the accepted media types can be given"),
    INVALID_TRANSITION := Kind(409, "invalid-transition", "The present state does not allow it"),
    KEY_IN_FLIGHT := Kind(409, "idempotency-in-flight", "The same request is being answered"),
    NOT_READY := Kind(409, "not-ready", "It does not exist yet"),
    GONE := Kind(410, "gone", "It was purged"),
    PRECONDITION_FAILED := Kind(412, "precondition-failed", "It has changed since it was seen"),
    PAYLOAD_TOO_LARGE := Kind(413, "payload-too-large", "The body is over the limit"),
    UNSUPPORTED_MEDIA_TYPE := Kind(415, "unsupported-media-type", "The body has a media type that is not read here"),
    RANGE_NOT_SATISFIABLE := Kind(416, "range-not-satisfiable", "The range lies outside the content"),
    VALIDATION_ERROR := Kind(422, "validation-error", "The request cannot be carried out as written"),
    KEY_REUSED := Kind(422, "idempotency-key-reused", "The Idempotency-Key belongs to another request"),
    QUOTA_EXCEEDED := Kind(429, "quota-exceeded", "More was asked for than a quota allows", registered=True),
    INTERNAL_ERROR := Kind(500, "internal-error", "The service failed"),
    SERVICE_UNAVAILABLE := Kind(503, "service-unavailable", "Something that the service needs does not answer"),
    OVERLOADED := Kind(503, "overloaded", "More requests have come than can be carried out now"),
    STORAGE_FULL := Kind(507, "storage-full", "The storage takes no more"),
)
OF_STATUS = {kind.status: kind for kind in reversed(KINDS)}  # the first of a status stands for it
OF_ERROR: Mapping[type[Exception], Kind] = {
    NotFound: NOT_FOUND,
    Unauthenticated: UNAUTHENTICATED,
    Forbidden: INSUFFICIENT_SCOPE,
    Gone: GONE,
    InvalidTransition: INVALID_TRANSITION,
    NotReady: NOT_READY,
    KeyInFlight: KEY_IN_FLIGHT,
    KeyReused: KEY_REUSED,
    PreconditionFailed: PRECONDITION_FAILED,
    QuotaExceeded: QUOTA_EXCEEDED,
    TooLarge: PAYLOAD_TOO_LARGE,
    Overloaded: OVERLOADED,
    StorageFull: STORAGE_FULL,
    StorageUnavailable: SERVICE_UNAVAILABLE,
    ProviderUnavailable: SERVICE_UNAVAILABLE,
    HubUnavailable: SERVICE_UNAVAILABLE,
}
OF_KIND: Mapping[Kind, Mapping[str, str]] = {  # headers that always come with it
    SERVICE_UNAVAILABLE: {"Retry-After": RETRY_AFTER_S},
    OVERLOADED: {"Retry-After": "2"},
    UNAUTHENTICATED: {"WWW-Authenticate": "Bearer"},
    KEY_IN_FLIGHT: {"Retry-After": "1"},
}
OF_SOME = ("errors", "required_scopes", "violated_policies")  # members that other problems do not have


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
    required_scopes: list[str] = []  # that the credentials lack, of a 403
    violated_policies: list[str] = Field([], alias="violated-policies")  # of a 429: see RateLimit-Policy


def install(app: FastAPI) -> None:
    app.add_exception_handler(UnlearnError, _answer)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _answer)
    for error in AWAY:
        app.add_exception_handler(error, _answer)


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route: 500 is there anyway, 422 where something can be wrong, and what the guard may answer."""
    return {status: {"description": HTTPStatus(status).phrase} for status in sorted({*statuses, 422, 500})}


def problem(
    scope: Mapping[str, Any],
    kind: Kind,
    detail: str,
    errors: Iterable[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
    required_scopes: Sequence[str] = (),
    violated_policies: Sequence[str] = (),
) -> JSONResponse:
    body = Problem(
        type=kind.uri,
        title=kind.title,
        status=kind.status,
        detail=_plain(detail),
        instance=_plain(scope["path"]),
        request_id=scope["state"]["request_id"],
        errors=[
            ProblemError(pointer=_plain(pointer[:POINTER_MAX]), detail=_plain(words[:DETAIL_MAX]), code=code)
            for pointer, words, code in errors
        ],
        required_scopes=list(required_scopes),
        **{"violated-policies": list(violated_policies)},
    )
    empty = {name for name in OF_SOME if not getattr(body, name)}
    content = body.model_dump(by_alias=True, exclude=empty)
    headers = {**OF_KIND.get(kind, {}), **(headers or {})}
    return JSONResponse(content, kind.status, headers=headers, media_type=MEDIA_TYPE)


def answer_to(request: Request, error: Exception) -> JSONResponse:
    """Of an error of ours, of a body that is not as declared, or of a database that is away."""
    if isinstance(error, RequestValidationError):
        return _invalid(request, error)
    if isinstance(error, InvalidRequest):
        return _refused(request, error.problems, len(error.problems))
    if isinstance(error, AWAY):
        return problem(request.scope, SERVICE_UNAVAILABLE, "the database does not answer")
    kind = next((OF_ERROR[cls] for cls in type(error).__mro__ if cls in OF_ERROR), INTERNAL_ERROR)
    lacking = error.required_scopes if isinstance(error, Forbidden) else ()
    if isinstance(error, QuotaExceeded):
        retry = {"Retry-After": str(error.retry_after_s)}
        return problem(request.scope, kind, str(error), headers=retry, violated_policies=[error.policy])
    return problem(request.scope, kind, str(error), required_scopes=lacking)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return answer_to(request, error)


async def _http(request: Request, error: Exception) -> JSONResponse:
    """What the framework raises: no route, no method, a body that it cannot read."""
    assert isinstance(error, HTTPException)
    kind = OF_STATUS.get(error.status_code, INTERNAL_ERROR)
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in (ENOSPC, EDQUOT):
        return problem(request.scope, STORAGE_FULL, "no room to receive the body")
    if kind is METHOD_NOT_ALLOWED:
        return problem(request.scope, kind, str(error.detail), headers={"Allow": _allowed(request)})
    if kind is MALFORMED_JSON and "json" not in request.headers.get("content-type", ""):
        kind = MALFORMED_BODY
    return problem(request.scope, kind, str(error.detail), headers=error.headers)


def _allowed(request: Request) -> str:
    """All methods of the path: the framework names those of the first route that has it, and a path has several."""
    routes = list(_routes(request.app))
    path = next(route.path for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    methods = {method for route in routes if route.path == path for method in route.methods or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))  # see edge.py


def _routes(router: FastAPI | APIRouter) -> Iterator[Route]:
    for route in router.routes:
        if included := getattr(route, "original_router", None):
            yield from _routes(included)
        elif isinstance(route, Route):
            yield route


def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    found = error.errors()
    syntax = next((item for item in found if item["type"] == "json_invalid"), None)
    if syntax is not None:
        detail = f"{syntax['ctx']['error']} at character {syntax['loc'][-1]}"
        return problem(request.scope, MALFORMED_JSON, detail)
    return _refused(request, [_field_problem(item, error.body) for item in found[:ERRORS_MAX]], len(found))


def _refused(request: Request, problems: Sequence[FieldProblem], count: int) -> JSONResponse:
    """`count`: of all, of which `problems` may be the first."""
    named = [f"{item.pointer[:POINTER_MAX]} {item.detail[:DETAIL_MAX]}".strip() for item in problems[:NAMED]]
    more = [f"and {count - NAMED} more"] if count > NAMED else []
    return problem(request.scope, VALIDATION_ERROR, "; ".join(named + more), problems[:ERRORS_MAX])


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
    for method, operation in (one for path in openapi["paths"].values() for one in path.items()):
        if "security" in operation:
            _declare_guarded(method, operation["responses"])
        for status, answer in operation["responses"].items():
            if int(status) >= HTTPStatus.BAD_REQUEST and (status == "422" or "content" not in answer):
                answer["content"] = content


def _declare_guarded(method: str, responses: dict[str, Any]) -> None:
    """What the guard may answer, whatever the route (see guard.py)."""
    may = [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE]
    if method == "get" and "application/json" in responses.get("200", {}).get("content", {}):
        may.append(HTTPStatus.NOT_MODIFIED)
    for status in may:
        responses.setdefault(str(int(status)), {"description": status.phrase})
