"""Uploaded sets, JSON Lines, and stored figures, one JSON document: judged before anything is kept."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePosixPath
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile
from pydantic import ConfigDict

from service.api.deps import Here, Page, PageQuery, Reads, Who, link_next, page
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.api.once import OnceOnly
from service.api.shapes import FILES_PATH, FileObject, file_object
from service.domain import rows, scores
from service.domain.errors import UnlearnError
from service.domain.identity import Scope
from service.domain.job import FilePurpose, Strict
from service.store import files
from service.store.storage import CHUNK_BYTES

router = APIRouter(prefix=FILES_PATH, tags=["files"], route_class=Guarded)


# Beyond these an upload is refused while it arrives, and nothing of it is stored. One field that is not known is let
# through: it is small, and then refused by its name.
PARTS: Any = {"max_files": 1, "max_fields": 2, "max_part_size": 1024}


class Upload(Strict):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    purpose: FilePurpose
    file: UploadFile


@router.post(
    "",
    status_code=201,
    summary="Upload a set, or stored figures",
    dependencies=[needs(Scope.FILES_WRITE), Depends(Reads("multipart/form-data"))],
    responses=declared(400, 409, 413, 415, 503, 507),
    form_limits=PARTS,
)
def upload(
    here: Here,
    who: Who,
    once: OnceOnly,
    form: Annotated[Upload, Form(media_type="multipart/form-data")],
    response: Response,
) -> FileObject:
    """Of a set: one JSON object per line, with `question` and `answer`, or `prompt` and `completion`, or `text`.

    Beside them a row may have `paraphrased_question` and `paraphrased_answer`, strings, and `perturbed_answer`, a list of
    wrong answers: what is measured then is more. An `eval_set` is for a benchmark; its rows have the columns that
    `GET /v1/suites` names. `eval_scores` are figures of a retrained model, one JSON document: figure -> `agg_value` and,
    by row, `value_by_index`. A line that is wrong is named by its number, and then nothing is kept.
    """
    source = form.file.file
    count = _count(form.purpose, source)
    source.seek(0)
    name, limit = shown_name(form.file.filename), here.settings.upload_max_bytes
    kept = files.keep(here.storage, here.secrets, who.tenant, name, _chunks(source), limit)
    with here.sessions.begin() as s:
        try:
            once.first(s)
            row = files.insert(s, kept, purpose=form.purpose, rows=count)
            answer, headers = file_object(here.secrets, row), {"Location": f"{FILES_PATH}/{row.id}"}
            once.keep(s, answer, headers)
        except Exception:  # nothing is committed yet; where the commit fails, nobody knows, and the sweep looks later
            with suppress(UnlearnError):
                here.storage.delete(files.file_key(kept.file_id))
            raise
    response.headers.update(headers)
    return answer


@router.get("", summary="List files", dependencies=[needs(Scope.FILES_READ)], responses=declared(503))
def list_files(
    here: Here, query: Annotated[PageQuery, Query()], request: Request, response: Response
) -> Page[FileObject]:
    with here.sessions.begin() as s:
        found, has_more = files.page(s, **query.model_dump())
    answer = page([file_object(here.secrets, row) for row in found], [row.id for row in found], has_more)
    link_next(request, response, query, answer)
    return answer


@router.get("/{file_id}", summary="One file", dependencies=[needs(Scope.FILES_READ)], responses=declared(404, 503))
def get_file(here: Here, file_id: str) -> FileObject:
    with here.sessions.begin() as s:
        return file_object(here.secrets, files.get(s, file_id))


@router.delete(
    "/{file_id}",
    status_code=204,
    summary="Purge a file",
    dependencies=[needs(Scope.FILES_WRITE)],
    responses=declared(404, 409, 503),
)
def delete_file(here: Here, file_id: str) -> None:
    """Purged: its key is lost first, then its bytes. Counts and a keyed digest stay, for the evidence of jobs that used it.

    Refused while a benchmark, or a job that has not ended, needs it. To purge twice is to purge once.
    """
    with here.sessions.begin() as s:
        key = files.purge(s, file_id)
    here.storage.delete(key)  # where this fails, what is left cannot be read, and the sweep deletes it


def _count(purpose: FilePurpose, source: IO[bytes]) -> int:
    """How many rows, or figures. Raises InvalidRequest for what is wrong with them."""
    match purpose:
        case "eval_scores":
            return len(scores.read(source.read(scores.BYTES_MAX + 1), "/file").figures)
        case "eval_set":
            return sum(1 for _ in rows.each_object(rows.lines(source), "/file"))
    return sum(1 for _ in rows.each(rows.lines(source), "/file"))


def shown_name(given: str | None) -> str:
    """What the client calls it, for people to read: the last part, printable, short. Never used as a path."""
    name = PurePosixPath((given or "").replace("\\", "/")).name
    return "".join(character for character in name if character.isprintable())[:255] or "file.jsonl"


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: source.read(CHUNK_BYTES), b"")
