"""What a job leaves behind: its report, in two forms, and its artifacts, streamed from the storage."""

import re
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import PurePosixPath
from typing import Annotated

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from service.api import shapes
from service.api.deps import Here, Page, Parts, page, unchanged
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.api.negotiate import preferred
from service.api.shapes import JOBS_PATH, REPORT_HTML, REPORT_JSON, ArtifactObject
from service.domain.errors import NotFound, NotReady
from service.domain.identity import Scope
from service.domain.job import TERMINAL
from service.domain.report import Report
from service.store import artifacts, jobs
from service.store.storage import Stored
from service.store.tables import Artifact

router = APIRouter(tags=["results"], route_class=Guarded)

REPORTS = {"application/json": REPORT_JSON, "text/html": REPORT_HTML}
REPORT_CSP = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
BYTES = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
DOWNLOAD_THREADS = CapacityLimiter(8)  # a storage that hangs holds no thread that other requests need
ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.get(
    f"{JOBS_PATH}/{{job_id}}/report",
    summary="The report",
    dependencies=[needs(Scope.REPORTS_READ)],
    response_model=Report,
    responses=declared(404, 406, 409, 503)
    | {200: {"content": {"text/html": {}}}, 304: {"description": "Not modified"}},
)
def report(
    here: Here, job_id: str, request: Request, accept: Annotated[str, Header(include_in_schema=False)] = "*/*"
) -> Response:
    """JSON or, by `Accept`, HTML that needs no network. 409 until the job has ended; 404 if it ended without one."""
    media_type = preferred(accept, list(REPORTS))
    if media_type is None:
        raise HTTPException(406, f"the report comes as {' or '.join(REPORTS)}")
    with here.sessions.begin() as s:
        job = jobs.get(s, job_id)
        if job.status not in TERMINAL:
            raise NotReady(f"the job is {job.status}; its report comes when it has succeeded")
        try:
            artifact = artifacts.named(s, job_id, REPORTS[media_type])
        except NotFound:
            raise NotFound("report", job_id) from None
    extra = {"Content-Security-Policy": REPORT_CSP} if media_type == "text/html" else {}
    name = f"{job_id}-{REPORTS[media_type]}"
    headers = _headers(artifact) | extra | {"Vary": "Accept", "Content-Disposition": f'inline; filename="{name}"'}
    if unchanged(request, headers["ETag"]):
        return Response(status_code=304, headers={"ETag": headers["ETag"], "Vary": headers["Vary"]})
    return StreamingResponse(_content(here, artifact), headers=headers, media_type=media_type)


@router.get(
    f"{JOBS_PATH}/{{job_id}}/artifacts",
    summary="What the job published",
    dependencies=[needs(Scope.ARTIFACTS_READ)],
    responses=declared(404, 503),
)
def list_artifacts(here: Here, job_id: str) -> Page[ArtifactObject]:
    """All of them; none before the job has succeeded."""
    with here.sessions.begin() as s:
        jobs.get(s, job_id)
        found = artifacts.of_job(s, job_id)
    return page([shapes.artifact_object(row) for row in found], [row.id for row in found], has_more=False)


@router.get(
    f"{JOBS_PATH}/{{job_id}}/artifacts/{{artifact_id}}/content",
    summary="Download an artifact",
    dependencies=[needs(Scope.ARTIFACTS_READ)],
    response_class=StreamingResponse,
    responses=declared(404, 416, 503)
    | {
        200: {"content": BYTES},
        206: {"description": "The range", "content": BYTES},
        304: {"description": "Not modified"},
    },
)
def content(here: Here, job_id: str, artifact_id: str, request: Request) -> Response:
    """`ETag` is the SHA-256. One range per request is served."""
    with here.sessions.begin() as s:
        jobs.get(s, job_id)
        artifact = artifacts.get(s, job_id, artifact_id)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(artifact.name).name)
    headers = _headers(artifact) | {"Content-Disposition": f'attachment; filename="{name}"'}
    if unchanged(request, headers["ETag"]):
        return Response(status_code=304, headers={"ETag": headers["ETag"]})
    part = _range(request, artifact)
    if part is None:
        return StreamingResponse(_content(here, artifact), headers=headers, media_type=artifact.media_type)
    del headers["Content-Digest"]  # it would be that of the part
    headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{artifact.bytes}"
    headers["Content-Length"] = str(len(part))
    return StreamingResponse(_content(here, artifact, part), 206, headers=headers, media_type=artifact.media_type)


def _headers(artifact: Artifact) -> dict[str, str]:
    digest = f"sha-256=:{b64encode(bytes.fromhex(artifact.sha256)).decode()}:"  # RFC 9530
    return {
        "ETag": f'"{artifact.sha256}"',
        "Content-Length": str(artifact.bytes),
        "Content-Digest": digest,
        "Repr-Digest": digest,
        "Accept-Ranges": "bytes",
    }


def _content(here: Parts, artifact: Artifact, part: range | None = None) -> AsyncIterator[bytes]:
    """The first chunk is read at once: what is missing, or small and damaged, must be told before the answer begins.

    Where a later chunk shows damage, the answer breaks off before its end. A part is checked by whoever puts it together.
    """
    if part is None:
        chunks = here.storage.verified(artifact.key, Stored(artifact.bytes, artifact.sha256))
    else:
        chunks = here.storage.read(artifact.key, part.start, part.stop)
    return _followed(next(chunks, b""), chunks)


async def _followed(first: bytes, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    chunk = first
    while chunk:
        yield chunk
        chunk = await run_sync(next, chunks, b"", limiter=DOWNLOAD_THREADS)


def _range(request: Request, artifact: Artifact) -> range | None:
    """RFC 9110: a header that is not understood, or speaks of another version, is passed over."""
    match = ONE_RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or match[0] == "bytes=-":
        return None
    if request.headers.get("if-range", f'"{artifact.sha256}"') != f'"{artifact.sha256}"':
        return None
    first, last = match.groups()
    size = artifact.bytes
    start, stop = (int(first), min(int(last or size) + 1, size)) if first else (max(0, size - int(last)), size)
    if first and last and int(last) < int(first):
        return None
    if start >= stop:
        raise HTTPException(416, f"the artifact has {size} bytes", {"Content-Range": f"bytes */{size}"})
    return range(start, stop)
