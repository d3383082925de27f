"""Deletion requests: submit, look, decide."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy.orm import Session

from service.api import intake, retained
from service.api.deps import Here, Page, PageQuery, Parts, Reads, Who, link_next, page, versions
from service.api.errors import Problem, answer_to, declared
from service.api.guard import Guarded, needs
from service.api.intake import DeletionRequestObject
from service.api.once import Once, OnceOnly, Replayed
from service.api.shapes import REQUESTS_PATH
from service.domain.deletion import (
    Closing,
    DeletionCreate,
    Denial,
    Extension,
    Regulation,
    RequestStatus,
    Subject,
)
from service.domain.errors import UnlearnError
from service.domain.identity import Principal, Scope
from service.domain.job import EXACT_MAX, Strict, Time
from service.store import deletion_jobs, deletion_reads, deletions, digests
from service.store.session import AWAY
from service.store.tables import DeletionRequest

router = APIRouter(prefix=REQUESTS_PATH, tags=["deletion requests"], route_class=Guarded)

BATCH_MAX = 100
EXPECTED = (UnlearnError, *AWAY)
Versions = Annotated[frozenset[int] | None, Depends(versions)]


class RequestsQuery(PageQuery):
    status: RequestStatus | None = None
    regulation: Regulation | None = None
    due_before: Time | None = None
    external_reference: str | None = Field(default=None, max_length=255)


class Search(RequestsQuery):
    subject: Subject = Field(description="an identifier as it was submitted, capitals aside")


class RowsQuery(Strict):
    after: int = Field(default=0, ge=0, le=EXACT_MAX, description="the number of the row after which to begin")
    limit: int = Field(default=1000, ge=1, le=10_000)


class LeaveOutQuery(Strict):
    leave_out_retained: bool = Field(
        default=False,
        description="jobs of plans train without those of its rows that the plan's retain set has: they use a copy of that "
        "set without them; from then on, for every later job on its models, too",
    )


class RequestedRow(BaseModel):
    row: int = Field(description="its number in the request's forget set, from 1")
    digest: str = Field(description="keyed: who has no key cannot try out what the row said")


class RequestedRows(BaseModel):
    object: Literal["list"] = "list"
    data: list[RequestedRow]
    has_more: bool


class Batch(Strict):
    requests: list[dict[str, Any]] = Field(
        min_length=1, max_length=BATCH_MAX, description="each as the body of POST /v1/deletion-requests"
    )


class BatchItem(BaseModel):
    index: int = Field(description="of the request in the batch, from 0")
    status: int = Field(description="as if it had been sent alone: 201, or that of the problem")
    object: DeletionRequestObject | None = None
    problem: Problem | None = None


class BatchResult(BaseModel):
    results: list[BatchItem] = Field(description="one per request, in order")


@router.post(
    "",
    status_code=201,
    summary="Submit a deletion request",
    dependencies=[needs(Scope.REQUESTS_CREATE), Depends(Reads("application/json"))],
    responses=declared(400, 409, 413, 415, 503, 507),
)
def create(here: Here, who: Who, once: OnceOnly, asked: DeletionCreate, response: Response) -> DeletionRequestObject:
    """What is to be forgotten is an uploaded file, or up to 1,000 rows, which become one.

    It waits for as many approvals as the tenant wants, and then for a job that serves it.
    """
    answer = intake.submit(here, who, asked, once)
    response.headers.update(intake.created(answer))
    return answer


@router.post(
    "/batch",
    summary="Submit many",
    dependencies=[needs(Scope.REQUESTS_CREATE), Depends(Reads("application/json"))],
    responses=declared(400, 413, 415, 503),
)
def create_batch(here: Here, who: Who, once: OnceOnly, batch: Batch, request: Request) -> BatchResult:
    """Each by itself: one that is refused leaves the others as they are, and its problem stands in its place.

    With an `Idempotency-Key`, a batch that is sent again makes none a second time: each is known by the key and its index.
    """
    parts = ((index, given, once.part(index, given)) for index, given in enumerate(batch.requests))
    read: retained.Read = {}
    return BatchResult(results=[_item(here, who, request, read, *part) for part in parts])


def _item(
    here: Parts,
    who: Principal,
    request: Request,
    read: retained.Read,
    index: int,
    given: dict[str, Any],
    once: Once,
) -> BatchItem:
    try:
        with here.sessions.begin() as s:
            once.look(s)
        answer = intake.submit(here, who, DeletionCreate.model_validate(given), once, read)
        return BatchItem(index=index, status=201, object=answer)
    except Replayed as before:
        made = DeletionRequestObject.model_validate_json(before.answer.body)
        return BatchItem(index=index, status=before.answer.status, object=made)
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False, include_input=False)]
        reply = answer_to(request, RequestValidationError(found, body=given))
    except EXPECTED as error:
        reply = answer_to(request, error)
    return BatchItem(
        index=index, status=reply.status_code, problem=Problem.model_validate(json.loads(bytes(reply.body)))
    )


@router.get("", summary="List deletion requests", dependencies=[needs(Scope.REQUESTS_READ)], responses=declared(503))
def list_requests(
    here: Here, query: Annotated[RequestsQuery, Query()], request: Request, response: Response
) -> Page[DeletionRequestObject]:
    answer = _page(here, **query.model_dump())
    link_next(request, response, query, answer)
    return answer


@router.post(
    "/search",
    summary="Find the requests about a person",
    dependencies=[needs(Scope.REQUESTS_READ, Scope.SUBJECTS_READ), Depends(Reads("application/json"))],
    responses=declared(400, 413, 415, 503),
)
def search(here: Here, who: Who, asked: Search) -> Page[DeletionRequestObject]:
    """In a body, since URLs are logged on their way. The next page: the same, with `last_id` as `after`.

    To know whether a person has asked is to know something about the person: hence a scope of its own.
    """
    digest = digests.subject_digest(here.secrets, who.tenant, asked.subject)
    return _page(here, **asked.model_dump() | {"subject": digest})


@router.get(
    "/{request_id}",
    summary="One deletion request",
    dependencies=[needs(Scope.REQUESTS_READ)],
    responses=declared(404, 503),
)
def get(here: Here, request_id: str, response: Response) -> DeletionRequestObject:
    """`If-None-Match` is heard. The `ETag` is what `If-Match` of the verbs below takes."""
    with here.sessions.begin() as s:
        return _tagged(response, _one(s, deletions.get(s, request_id)))


@router.get(
    "/{request_id}/rows",
    summary="The digests of a request's rows",
    dependencies=[needs(Scope.REQUESTS_READ)],
    responses=declared(404, 503),
)
def rows(here: Here, request_id: str, query: Annotated[RowsQuery, Query()]) -> RequestedRows:
    """A report names each row that it measured by this digest, too, and both stay when the rows are purged."""
    with here.sessions.begin() as s:
        found = deletions.get(s, request_id).row_digests
    chosen = found[query.after : query.after + query.limit]
    data = [RequestedRow(row=number, digest=digest) for number, digest in enumerate(chosen, query.after + 1)]
    return RequestedRows(data=data, has_more=query.after + len(chosen) < len(found))


@router.post(
    "/{request_id}/approve",
    summary="Approve a request",
    dependencies=[needs(Scope.REQUESTS_APPROVE)],
    responses=declared(404, 409, 412, 503),
)
def approve(
    here: Here, request_id: str, response: Response, versions: Versions, query: Annotated[LeaveOutQuery, Query()]
) -> DeletionRequestObject:
    """By somebody else than who submitted it. Approving twice is approving once."""
    with here.sessions.begin() as s:
        return _tagged(response, _one(s, deletions.approve(s, request_id, versions, **dict(query))))


@router.post(
    "/{request_id}/deny",
    summary="Deny a request",
    dependencies=[needs(Scope.REQUESTS_APPROVE), Depends(Reads("application/json"))],
    responses=declared(400, 404, 409, 412, 413, 415, 503),
)
def deny(here: Here, request_id: str, denial: Denial, response: Response, versions: Versions) -> DeletionRequestObject:
    """Not once a job serves it, unless it was requeued since. Its rows are purged."""
    with here.sessions.begin() as s:
        return _tagged(response, _one(s, deletions.deny(s, request_id, denial, versions)))


@router.post(
    "/{request_id}/cancel",
    summary="Take a request back",
    dependencies=[needs(Scope.REQUESTS_CANCEL)],
    responses=declared(404, 409, 412, 503),
)
def cancel(here: Here, request_id: str, response: Response, versions: Versions) -> DeletionRequestObject:
    """Not while a job serves it: cancel that first. Its rows are purged."""
    with here.sessions.begin() as s:
        return _tagged(response, _one(s, deletions.cancel(s, request_id, versions)))


@router.post(
    "/{request_id}/extend",
    summary="Extend a deadline",
    dependencies=[needs(Scope.REQUESTS_APPROVE), Depends(Reads("application/json"))],
    responses=declared(400, 404, 409, 412, 413, 415, 503),
)
def extend(
    here: Here, request_id: str, extension: Extension, response: Response, versions: Versions
) -> DeletionRequestObject:
    """Once, with a reason, and before it is due: gdpr by up to two months, ccpa by up to 45 days."""
    with here.sessions.begin() as s:
        return _tagged(response, _one(s, deletions.extend(s, request_id, extension, versions)))


@router.post(
    "/{request_id}/requeue",
    summary="Have a request that failed served again",
    dependencies=[needs(Scope.REQUESTS_APPROVE)],
    responses=declared(404, 409, 412, 503),
)
def requeue(
    here: Here, request_id: str, response: Response, versions: Versions, query: Annotated[LeaveOutQuery, Query()]
) -> DeletionRequestObject:
    """It is approved again, and waits for another job on each of its models that may still know its rows: one that the model's
    plan makes, or one that somebody submits. Requeuing a request that waits changes nothing.
    """
    with here.sessions.begin() as s:
        return _tagged(response, _one(s, deletion_jobs.requeue(s, request_id, versions, **dict(query))))


@router.post(
    "/{request_id}/close",
    summary="Close a request whose jobs failed",
    dependencies=[needs(Scope.REQUESTS_APPROVE), Depends(Reads("application/json"))],
    responses=declared(400, 404, 409, 412, 413, 415, 503),
)
def close(
    here: Here, request_id: str, closing: Closing, response: Response, versions: Versions
) -> DeletionRequestObject:
    """A person answers, with a reason, for its being completed though no job has passed for each of its models.

    Somebody else than who submitted it, if it wanted approval. Its rows are purged, as the tenant's rule says.
    """
    with here.sessions.begin() as s:
        return _tagged(response, _one(s, deletions.close(s, request_id, closing, versions)))


def _page(here: Parts, **asked: Any) -> Page[DeletionRequestObject]:
    with here.sessions.begin() as s:
        found, has_more = deletion_reads.page(s, **asked)
        return page(intake.shown(s, found), [row.id for row in found], has_more)


def _one(s: Session, row: DeletionRequest) -> DeletionRequestObject:
    return intake.shown(s, [row])[0]


def _tagged(response: Response, answer: DeletionRequestObject) -> DeletionRequestObject:
    response.headers["ETag"] = intake.tag(answer)
    return answer
