"""What endpoints share: the parts of the service, pages, media types."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import IO, Annotated, Generic, Literal, NamedTuple, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import BackgroundTasks, Depends, Header, Request, Response
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from service.api.provider import Provider
from service.dispatch import Dispatcher
from service.domain.catalog import Catalog
from service.domain.errors import FieldProblem, Gone, InvalidRequest, NotFound
from service.domain.identity import Principal
from service.domain.job import Strict
from service.settings import Settings
from service.store import files, tenancy
from service.store.paging import Order
from service.store.secrets import Secrets
from service.store.session import Sessions
from service.store.storage import Storage

RING_THREADS = CapacityLimiter(2)  # a silent broker holds no thread that a request needs

T = TypeVar("T")


class Parts(NamedTuple):
    """What the service is made of. To a route, `sessions` are those of who asks, and bells ring after its answer."""

    settings: Settings
    sessions: Sessions
    storage: Storage
    dispatcher: Dispatcher
    catalog: Catalog
    secrets: Secrets
    provider: Provider | None  # of identities, beside API keys


class DeferredDispatcher:
    """Of one request: rings once its answer is sent, so that no request waits for a broker. `ring` is True: not known yet."""

    def __init__(self, dispatcher: Dispatcher, background: BackgroundTasks) -> None:
        self._dispatcher, self._background = dispatcher, background

    def ring(self, gpu_class: str) -> bool:
        self._background.add_task(partial(run_sync, self._dispatcher.ring, gpu_class, limiter=RING_THREADS))
        return True

    def reachable(self) -> bool:
        return self._dispatcher.reachable()


async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


async def _principal(request: Request) -> Principal:
    principal: Principal = request.state.principal  # of a route that is Guarded
    return principal


async def _bound(
    parts: Annotated[Parts, Depends(_parts)],
    who: Annotated[Principal, Depends(_principal)],
    background: BackgroundTasks,
) -> Parts:
    dispatcher = DeferredDispatcher(parts.dispatcher, background)
    return parts._replace(sessions=tenancy.bound(parts.sessions, who.tenant, who.id), dispatcher=dispatcher)


Everybody = Annotated[Parts, Depends(_parts)]  # of a public route: its sessions see every tenant
Who = Annotated[Principal, Depends(_principal)]
Here = Annotated[Parts, Depends(_bound)]


@contextmanager
def uploaded(here: Parts, file_id: str, purpose: str, pointer: str) -> Iterator[IO[bytes]]:
    """The bytes of a file that a request names. Raises InvalidRequest if it is not there, or is there for another purpose."""
    try:
        with here.sessions.begin() as s:
            file = files.get(s, file_id)
        if file.purpose != purpose:
            detail = f"{file_id} was uploaded as {file.purpose}, not as {purpose}"
            raise InvalidRequest(FieldProblem(pointer, detail, "purpose"))
        with files.content(here.storage, here.secrets, file) as content:
            yield content
    except NotFound as error:
        raise InvalidRequest(FieldProblem(pointer, f"there is no file {file_id}", "file_not_found")) from error
    except Gone as error:
        raise InvalidRequest(FieldProblem(pointer, str(error), "purged")) from error


class PageQuery(Strict):
    after: str | None = Field(default=None, max_length=64, description="the id after which the page begins")
    before: str | None = Field(default=None, max_length=64, description="the id before which the page ends")
    limit: int = Field(default=20, ge=1, le=100)
    order: Order = "desc"


class Page(BaseModel, Generic[T]):
    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


def page(data: Sequence[T], ids: Sequence[str], has_more: bool) -> Page[T]:
    return Page(data=list(data), first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)


def link_next(request: Request, response: Response, query: PageQuery, answer: Page[T]) -> None:
    """RFC 8288: where the next page in the same direction lies."""
    if not answer.has_more:
        return
    backwards = query.after is None and query.before is not None
    cursor = {"before": answer.first_id} if backwards else {"after": answer.last_id}
    url = request.url.include_query_params(**cursor)
    response.headers["Link"] = f'<{url.path}?{url.query}>; rel="{"prev" if backwards else "next"}"'


def unchanged(request: Request, etag: str) -> bool:
    """Whether the client has this already: If-None-Match, compared weakly (RFC 9110, section 13.1.2)."""
    given = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return etag in given or given == ["*"]


def revalidated(request: Request, response: Response) -> Response:
    """What a GET answers with JSON has an ETag, its own or a digest, and is not sent to who has it already."""
    whole = hasattr(response, "body") and response.headers.get("content-type") == "application/json"
    if request.method != "GET" or response.status_code != 200 or not whole:
        return response
    response.headers.setdefault("ETag", f'"{sha256(response.body).hexdigest()[:32]}"')
    if not unchanged(request, response.headers["ETag"]):
        return response
    kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
    return Response(status_code=304, headers=kept)


async def versions(
    if_match: Annotated[
        str, Header(alias="If-Match", description="the ETag at which it must still be, else 412")
    ] = "*",
) -> frozenset[int] | None:
    """A dependency: those at which the object must be (RFC 9110, section 13.1.1); None: at any."""
    given = [tag.strip() for tag in if_match.split(",")]
    if given == ["*"]:
        return None
    found = (re.fullmatch(r'"([0-9]{1,18})(-[0-9a-f]+)?"', tag) for tag in given)  # others match nothing
    return frozenset(int(tag[1]) for tag in found if tag)


def media_type(headers: Headers) -> str:
    """Of the body, without parameters; "" where it is not told."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class Reads:
    """A dependency that refuses a body of another media type, before it is judged."""

    def __init__(self, media_type: str) -> None:
        self.media_type = media_type

    async def __call__(self, request: Request) -> None:
        given = media_type(request.headers)
        if given != self.media_type:
            raise HTTPException(415, f"send {self.media_type}, not {given or 'a body without Content-Type'}")
