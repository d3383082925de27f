"""What endpoints share: the parts of the service, pages, media types."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Annotated, Generic, Literal, NamedTuple, TypeVar

from fastapi import Depends, Request, Response
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from service.dispatch import Dispatcher
from service.domain.catalog import Catalog
from service.domain.errors import FieldProblem, InvalidRequest, NotFound
from service.domain.job import Strict
from service.settings import Settings
from service.store import files
from service.store.paging import Order
from service.store.session import Sessions
from service.store.storage import Storage

T = TypeVar("T")


class Parts(NamedTuple):
    settings: Settings
    sessions: Sessions
    storage: Storage
    dispatcher: Dispatcher
    catalog: Catalog


async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


Here = Annotated[Parts, Depends(_parts)]


@contextmanager
def uploaded(here: Parts, file_id: str, purpose: str, pointer: str) -> Iterator[IO[bytes]]:
    """The bytes of a file that a request names. Raises InvalidRequest if it is not there, or is there for another purpose."""
    try:
        with here.sessions.begin() as s:
            file = files.get(s, file_id)
        if file.purpose != purpose:
            detail = f"{file_id} was uploaded as {file.purpose}, not as {purpose}"
            raise InvalidRequest(FieldProblem(pointer, detail, "purpose"))
        with here.storage.open(file.key) as content:
            yield content
    except NotFound as error:
        raise InvalidRequest(FieldProblem(pointer, f"there is no file {file_id}", "file_not_found")) from error


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
