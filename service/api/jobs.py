"""Unlearning jobs: create, look, move, follow."""

import time
from collections.abc import Callable
from typing import Annotated, Any

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

from service.api import admission, attempts, polling, shapes, shown
from service.api.attempts import Attempts
from service.api.deps import Here, Page, PageQuery, Parts, Reads, Who, link_next, page, unchanged, versions
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.api.limits import count_job
from service.api.negotiate import preferred
from service.api.once import OnceOnly
from service.api.plan import JobPlan, plan
from service.api.shapes import JOBS_PATH, Checkpoints, Events, JobObject, Steps
from service.api.shown import Glance
from service.api.stream import EventStream
from service.domain.errors import NotFound
from service.domain.identity import Principal, Scope
from service.domain.job import EXACT_MAX, TERMINAL, JobCreate, ModelName, Status, Strict
from service.store import jobs, reads
from service.store.session import look
from service.store.tables import Job


class Glanced(Guarded):
    """Most polls find what they know: they are answered without what it takes to read a request and to tell of a job.

    With an API key, one statement tells who asks and what his job's row says.
    """

    async def recognise(self, request: Request, secret: str) -> Principal | None:
        if not _revalidates(request):
            return await super().recognise(request, secret)
        state, job_id = request.app.state, request.path_params["job_id"]
        found = await look(state.polls, shown.of_key, state.parts.secrets, secret, job_id)
        if found is None:
            return None
        request.state.row = found.row
        return found.principal

    async def known(self, request: Request) -> Response | None:
        if not _revalidates(request):
            return None
        now = await _glance(request, request.path_params["job_id"], getattr(request.state, "row", None))
        return Response(status_code=304, headers=now.headers) if unchanged(request, now.headers["ETag"]) else None


router = APIRouter(prefix=JOBS_PATH, tags=["unlearning jobs"], route_class=Guarded)

Versions = Annotated[frozenset[int] | None, Depends(versions)]
STREAM = "text/event-stream"
LOOK_EVERY_S = 1.0  # while a client waits for a change


class CreateQuery(Strict):
    dry_run: bool = Field(default=False, description="judge the request, answer with the plan, keep nothing")


class JobsQuery(PageQuery):
    status: Status | None = None
    model: ModelName | None = None


class EventsQuery(Strict):
    after_seq: int = Field(default=0, ge=0, le=EXACT_MAX)
    limit: int = Field(default=100, ge=1, le=1000)


class StepsQuery(Strict):
    after: int = Field(default=0, ge=0, le=EXACT_MAX, description="the step after which the series begins")
    limit: int = Field(default=1000, ge=1, le=10_000)


@router.post(
    "",
    status_code=201,
    summary="Ask a model to forget",
    dependencies=[needs(Scope.JOBS_CREATE), Depends(Reads("application/json")), Depends(count_job)],
    response_model=JobObject,
    responses=declared(400, 409, 413, 415, 503, 507)
    | {200: {"description": "The plan, of a dry run", "model": JobPlan}},
)
def create(
    here: Here, who: Who, once: OnceOnly, query: Annotated[CreateQuery, Query()], request: JobCreate, response: Response
) -> JobObject | Response:
    """The sets are ids of uploaded files, or up to 1,000 rows each, which become files.

    Benchmarks, an audit and gates are for the report and its verdict: they change nothing of how the model is trained.
    With `dry_run` the request is judged in the same way, and answered with what the job would be; nothing is kept.
    """
    if query.dry_run:
        return Response(plan(here, who, request).model_dump_json(), media_type="application/json")
    answer = admission.submit(here, who, request, once)
    response.headers.update(polling.created(answer))
    return answer


@router.get("", summary="List jobs", dependencies=[needs(Scope.JOBS_READ)], responses=declared(503))
def list_jobs(
    here: Here, query: Annotated[JobsQuery, Query()], request: Request, response: Response
) -> Page[JobObject]:
    with here.sessions.begin() as s:
        found, has_more = reads.page(s, **query.model_dump())
        answer = page(shown.job_objects(s, found), [job.id for job in found], has_more)
    link_next(request, response, query, answer)
    return answer


async def get(
    here: Here,
    job_id: str,
    request: Request,
    response: Response,
    prefer: Annotated[list[str] | None, Header(alias="Prefer", examples=[["wait=1"]])] = None,
) -> JobObject | Response:
    """`Retry-After` says when to look again; it is missing once the job has ended. `If-None-Match` is heard.

    With `Prefer: wait=20` the answer comes as soon as the job changes, or has ended, after 20 seconds at the latest; 30 are
    the most. What it changes from is the `ETag` in If-None-Match or, without it, the moment of the request.
    """
    wait_s = polling.wait_s(prefer or [])
    applied = {"Preference-Applied": f"wait={wait_s}"} if wait_s else {}
    if wait_s and (seen := await _waited(request, job_id, wait_s)):
        return Response(status_code=304, headers=seen.headers | applied)
    async with request.app.state.concurrency["reads"].slot():
        answer = await run_sync(_look, here, job_id)
    response.headers.update(polling.headers(answer) | applied)
    return answer


router.add_api_route(
    "/{job_id}",
    get,
    summary="One job",
    dependencies=[needs(Scope.JOBS_READ)],
    response_model=JobObject,
    responses=declared(404, 503) | {304: {"description": "Not modified"}},
    route_class_override=Glanced,
)


async def _waited(request: Request, job_id: str, wait_s: int) -> Glance | None:
    """Until it changes, or has ended, or the time is over. What the client has, if it still has the newest."""
    until = time.monotonic() + wait_s
    now = await _glance(request, job_id)
    first = None if "if-none-match" in request.headers else now.headers["ETag"]
    while (
        now.status not in TERMINAL
        and (now.headers["ETag"] == first or unchanged(request, now.headers["ETag"]))
        and (rest_s := until - time.monotonic()) > 0
        and not request.app.state.stopping()
    ):
        await anyio.sleep(min(LOOK_EVERY_S, rest_s))
        now = await _glance(request, job_id)
    return now if unchanged(request, now.headers["ETag"]) else None


def _revalidates(request: Request) -> bool:
    return "if-none-match" in request.headers and "prefer" not in request.headers


async def _glance(request: Request, job_id: str, row: Any = None) -> Glance:
    """Raises NotFound. `row`: of the job, where it was looked for with the key."""
    state = request.app.state
    if row is None:
        row = await look(state.polls, shown.of_tenant, request.state.principal.tenant, job_id)
    if row is None or row.id is None:
        raise NotFound("job", job_id)
    if row.status not in shown.BESIDE:
        return shown.glance(row, shown.Beside())
    connections = state.lines if row.status is Status.QUEUED else state.polls
    return shown.glance(row, await look(connections, shown.beside, row))


def _look(here: Parts, job_id: str) -> JobObject:
    with here.sessions.begin() as s:
        return shown.job_object(s, jobs.get(s, job_id))


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    summary="Cancel a job",
    dependencies=[needs(Scope.JOBS_CANCEL)],
    responses=declared(404, 409, 412, 503),
)
def cancel(here: Here, job_id: str, response: Response, versions: Versions) -> JobObject:
    """Ends a job that waits; asks the worker of one that runs to stop. Asking again changes nothing."""
    return _moved(here, jobs.request_cancel, job_id, versions, response)


@router.post(
    "/{job_id}/pause",
    status_code=202,
    summary="Pause a job",
    dependencies=[needs(Scope.JOBS_CANCEL)],
    responses=declared(404, 409, 412, 503),
)
def pause(here: Here, job_id: str, response: Response, versions: Versions) -> JobObject:
    """One that waits: no worker takes it until it is resumed. One that runs saves a checkpoint and stops: `pausing`, then
    `paused`. Asking again changes nothing.
    """
    return _moved(here, jobs.pause, job_id, versions, response)


@router.post(
    "/{job_id}/resume",
    status_code=202,
    summary="Resume a job",
    dependencies=[needs(Scope.JOBS_RETRY)],
    responses=declared(404, 409, 412, 503),
)
def resume(here: Here, job_id: str, response: Response, versions: Versions) -> JobObject:
    """One that is paused, at its old place in the line; it goes on from its last checkpoint. 409 while it is `pausing`."""
    return _moved(here, jobs.resume, job_id, versions, response)


@router.post(
    "/{job_id}/retry",
    status_code=202,
    summary="Try a failed job again",
    dependencies=[needs(Scope.JOBS_RETRY)],
    responses=declared(404, 409, 412, 503),
)
def retry(here: Here, job_id: str, response: Response, versions: Versions) -> JobObject:
    """At the end of the line, from its last checkpoint where it has one, with as many attempts as a new one.

    409 where its sets are purged, and for a job that serves deletion requests once it is out of date: another is to serve
    them, one of them was closed, or later jobs for requests have changed what the model has forgotten.
    """
    return _moved(here, jobs.retry, job_id, versions, response)


@router.post(
    "/{job_id}/reverify",
    status_code=201,
    summary="Evaluate a released adapter again, under the current verdict rules",
    dependencies=[needs(Scope.JOBS_CREATE), Depends(count_job)],
    response_model=JobObject,
    responses=declared(404, 409, 503),
)
def reverify(here: Here, job_id: str, once: OnceOnly, response: Response) -> JobObject:
    """Verdicts name the rules by which they were given, `rules`; later versions of the service have stricter ones.

    Creates a job whose `reverifies` names this one. It measures the adapter that this job released, as it is stored, on the same
    sets, and has a verdict, a report and a certificate of its own. It trains nothing, serves no deletion request and cannot be a
    `parent`. This job's verdict, report and certificate are not changed; when the new certificate is issued, this job gets an
    event `job.reverified` and the audit log an entry of that name. A new verdict of FAILED has no further effect: deletion
    requests that this job completed stay completed, and the adapter stays published.

    409 where this job has not succeeded, released no adapter or is itself a reverification, and where one of its sets is purged,
    or its model or a benchmark is no longer registered, or the model has other weights.
    """
    answer = admission.reverify(here, job_id, once)
    response.headers.update(polling.created(answer))
    return answer


def _moved(
    here: Parts,
    verb: Callable[[Session, str, jobs.Versions], Job],
    job_id: str,
    versions: jobs.Versions,
    response: Response,
) -> JobObject:
    with here.sessions.begin() as s:
        job = verb(s, job_id, versions)
        answer = shown.job_object(s, job)
    if job.status is Status.QUEUED:
        here.dispatcher.ring(job.gpu_class)
    response.headers.update(polling.headers(answer))
    return answer


@router.get(
    "/{job_id}/events",
    summary="What happened",
    dependencies=[needs(Scope.JOBS_READ)],
    response_model=Events,
    responses=declared(404, 406, 503)
    | {200: {"content": {STREAM: {"schema": {"type": "string"}}}}, 204: {"description": "The stream is at its end"}},
)
def events(
    here: Here,
    who: Who,
    job_id: str,
    query: Annotated[EventsQuery, Query()],
    request: Request,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", pattern=r"^[0-9]{1,18}$", description="of a stream that broke off")
    ] = None,
) -> Events | Response:
    """In order; `seq` has no gaps. Ask again with the last `seq` as `after_seq`.

    As `text/event-stream`, by `Accept`: the same, as it happens, until the job has ended. The `id` of an event is its
    `seq`; a stream that breaks off goes on after `Last-Event-ID`.
    """
    media_type = preferred(request.headers.get("accept", "*/*"), ["application/json", STREAM])
    if media_type is None:
        raise HTTPException(406, f"events come as application/json or {STREAM}")
    after_seq = query.after_seq if last_event_id is None else int(last_event_id)
    with here.sessions.begin() as s:
        job = jobs.get(s, job_id)
        if media_type == STREAM:
            if job.status in TERMINAL and job.last_seq <= after_seq:
                return Response(status_code=204)  # by which a browser knows that it need not come again
            state = request.app.state
            return EventStream(here, who, job_id, after_seq, state.concurrency["streams"], state.stopping)
        found = reads.events(s, job_id, query.after_seq, query.limit + 1)
    return Events(data=[shapes.event_object(row) for row in found[: query.limit]], has_more=len(found) > query.limit)


@router.get(
    "/{job_id}/attempts",
    summary="Who ran it, and how that ended",
    dependencies=[needs(Scope.JOBS_READ)],
    responses=declared(404, 503),
)
def list_attempts(here: Here, job_id: str) -> Attempts:
    """In order, the one that runs too."""
    with here.sessions.begin() as s:
        jobs.get(s, job_id)
        return Attempts(data=list(attempts.told(reads.attempts(s, job_id))))


@router.get(
    "/{job_id}/checkpoints",
    summary="What it can go on from",
    dependencies=[needs(Scope.JOBS_READ)],
    responses=declared(404, 503),
)
def list_checkpoints(here: Here, job_id: str) -> Checkpoints:
    """The last two, the newest first. None is left of a job that has succeeded or was cancelled, or failed a week ago."""
    with here.sessions.begin() as s:
        jobs.get(s, job_id)
        return Checkpoints(data=[shapes.checkpoint(row, attempt) for row, attempt in reads.checkpoints(s, job_id)])


@router.get(
    "/{job_id}/steps",
    summary="The series of solver steps",
    dependencies=[needs(Scope.JOBS_READ)],
    responses=declared(404, 503),
)
def steps(here: Here, job_id: str, query: Annotated[StepsQuery, Query()]) -> Steps:
    """Losses, dual variable, violation, learning rate, gradient norm and pace of each step, in order."""
    with here.sessions.begin() as s:
        job = jobs.get(s, job_id)
        found = reads.steps(s, job_id, query.after, query.limit + 1)
        checks = reads.checks(s, job_id)
    return Steps(
        attempt=job.attempt,
        data=[shapes.step(row) for row in found[: query.limit]],
        checks=[shapes.check(row) for row in checks if row.step >= query.after],
        has_more=len(found) > query.limit,
    )
