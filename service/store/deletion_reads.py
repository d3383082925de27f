"""What is shown of deletion requests."""

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session, undefer

from service.domain.deletion import Regulation, RequestStatus
from service.domain.errors import NotFound
from service.store.paging import Order, fetch_page
from service.store.tables import DeletionApproval, DeletionJob, DeletionRequest, Job


def page(
    s: Session,
    *,
    after: str | None = None,
    before: str | None = None,
    limit: int = 20,
    order: Order = "desc",
    status: RequestStatus | None = None,
    regulation: Regulation | None = None,
    due_before: datetime | None = None,
    external_reference: str | None = None,
    subject: str | None = None,
) -> tuple[Sequence[DeletionRequest], bool]:
    """(rows, has_more)

    Args:
        subject: its digest.
    """
    rows = select(DeletionRequest)
    if status is not None:
        rows = rows.where(DeletionRequest.status == status)
    if regulation is not None:
        rows = rows.where(DeletionRequest.regulation == regulation)
    if due_before is not None:
        rows = rows.where(DeletionRequest.due_at < due_before)
    if external_reference is not None:
        rows = rows.where(DeletionRequest.external_reference == external_reference)
    if subject is not None:
        rows = rows.where(DeletionRequest.subject_digests.contains([subject]))
    return fetch_page(s, rows, DeletionRequest.id, after=after, before=before, limit=limit, order=order)


def approvals(s: Session, request_ids: Collection[str]) -> Sequence[DeletionApproval]:
    given = select(DeletionApproval).where(DeletionApproval.request_id.in_(request_ids))
    return s.scalars(given.order_by(DeletionApproval.created_at, DeletionApproval.approved_by)).all()


class Served(NamedTuple):
    request_id: str
    job_id: str
    model: str
    forget_set: str  # the job's


def served_by(s: Session, request_ids: Collection[str]) -> Sequence[Served]:
    """In the order in which the jobs came."""
    links = select(DeletionJob.request_id, Job.id, Job.model, Job.forget_set).join(Job, Job.id == DeletionJob.job_id)
    found = s.execute(links.where(DeletionJob.request_id.in_(request_ids)).order_by(Job.id))
    return [Served(*row) for row in found]


class LeftOut(NamedTuple):
    request_id: str
    served: bool  # by a job on the model
    row_digests: list[str]


def left_out(s: Session, model: str) -> list[LeftOut]:
    """The requests that still want their rows forgotten and left out of what jobs of a plan for the model retain, the oldest
    first."""
    jobs = select(Job.id).join(DeletionJob, DeletionJob.job_id == Job.id)
    jobs = jobs.where(
        DeletionJob.request_id == DeletionRequest.id, Job.model == model, DeletionJob.requeued_at.is_(None)
    )
    found = select(DeletionRequest.id, jobs.exists(), DeletionRequest.row_digests).where(
        DeletionRequest.models.contains([model]),
        DeletionRequest.leave_out_retained,
        DeletionRequest.status.not_in((RequestStatus.DENIED, RequestStatus.CANCELLED)),
    )
    return [LeftOut(*row) for row in s.execute(found.order_by(DeletionRequest.id))]


def digests_of_job(s: Session, job_id: str) -> Iterator[str]:
    """Of the rows of all requests that it serves or has served."""
    rows = select(DeletionRequest.row_digests).join(DeletionJob, DeletionJob.request_id == DeletionRequest.id)
    for found in s.scalars(rows.where(DeletionJob.job_id == job_id)):
        yield from found


def with_digests(s: Session, request_id: str) -> DeletionRequest:
    """With the digests of its rows, which are many."""
    row = s.get(DeletionRequest, request_id, options=[undefer(DeletionRequest.row_digests)], populate_existing=True)
    if row is None:
        raise NotFound("deletion request", request_id)
    return row
