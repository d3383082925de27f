"""Unlearning jobs: create, look, cancel, follow."""

from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field

from service.api import shapes, shown
from service.api.admission import submit
from service.api.deps import Here, Page, PageQuery, Reads, link_next, page, unchanged
from service.api.errors import declared
from service.api.shapes import JOBS_PATH, Events, JobObject, Steps
from service.domain.job import TERMINAL, JobCreate, ModelName, Status, Strict
from service.store import jobs, reads

router = APIRouter(prefix=JOBS_PATH, tags=["unlearning jobs"])

QUEUED_RETRY_S = 10
RUNNING_RETRY_S = 30


class JobsQuery(PageQuery):
    status: Status | None = None
    model: ModelName | None = None


class EventsQuery(Strict):
    after_seq: int = Field(default=0, ge=0, lt=2**63)
    limit: int = Field(default=100, ge=1, le=1000)


class StepsQuery(Strict):
    after: int = Field(default=0, ge=0, lt=2**63, description="the step after which the series begins")
    limit: int = Field(default=1000, ge=1, le=10_000)


@router.post(
    "",
    status_code=201,
    summary="Ask a model to forget",
    dependencies=[Depends(Reads("application/json"))],
    responses=declared(400, 413, 415, 503, 507),
)
def create(here: Here, request: JobCreate, response: Response) -> JobObject:
    """The sets are ids of uploaded files, or up to 1,000 rows each, which become files.

    Benchmarks, an audit and gates are for the report and its verdict: they change nothing of how the model is trained.
    """
    answer = submit(here, request)
    response.headers["Location"] = answer.links.self
    _poll_headers(response, answer)
    return answer


@router.get("", summary="List jobs", responses=declared(503))
def list_jobs(
    here: Here, query: Annotated[JobsQuery, Query()], request: Request, response: Response
) -> Page[JobObject]:
    with here.sessions.begin() as s:
        found, has_more = reads.page(s, **query.model_dump())
        answer = page(shown.job_objects(s, found), [job.id for job in found], has_more)
    link_next(request, response, query, answer)
    return answer


@router.get(
    "/{job_id}",
    summary="One job",
    response_model=JobObject,
    responses=declared(404, 503) | {304: {"description": "Not modified"}},
)
def get(here: Here, job_id: str, request: Request, response: Response) -> JobObject | Response:
    """`Retry-After` says when to look again; it is missing once the job has ended. `If-None-Match` is heard."""
    with here.sessions.begin() as s:
        answer = shown.job_object(s, jobs.get(s, job_id))
    _poll_headers(response, answer)
    if unchanged(request, response.headers["ETag"]):
        return Response(status_code=304, headers=dict(response.headers))
    return answer


@router.post("/{job_id}/cancel", status_code=202, summary="Cancel a job", responses=declared(404, 409, 503))
def cancel(here: Here, job_id: str, response: Response) -> JobObject:
    """Ends a job that waits; asks the worker of one that runs to stop. Asking again changes nothing."""
    with here.sessions.begin() as s:
        answer = shown.job_object(s, jobs.request_cancel(s, job_id))
    _poll_headers(response, answer)
    return answer


@router.get("/{job_id}/events", summary="What happened", responses=declared(404, 503))
def events(here: Here, job_id: str, query: Annotated[EventsQuery, Query()]) -> Events:
    """In order; `seq` has no gaps. Ask again with the last `seq` as `after_seq`."""
    with here.sessions.begin() as s:
        jobs.get(s, job_id)
        found = reads.events(s, job_id, query.after_seq, query.limit + 1)
    return Events(data=[shapes.event_object(row) for row in found[: query.limit]], has_more=len(found) > query.limit)


@router.get("/{job_id}/steps", summary="The series of solver steps", responses=declared(404, 503))
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


def _poll_headers(response: Response, job: JobObject) -> None:
    # Not the version alone: the place in the line and the workers change without it.
    response.headers["ETag"] = f'"{sha256(job.model_dump_json(warnings=False).encode()).hexdigest()[:32]}"'
    if job.status is Status.QUEUED:
        response.headers["Retry-After"] = str(QUEUED_RETRY_S)
    elif job.status not in TERMINAL:
        eta = job.progress.eta_seconds
        pace = RUNNING_RETRY_S if eta is None else min(RUNNING_RETRY_S, eta / 20)
        response.headers["Retry-After"] = str(max(1, round(pace)))
