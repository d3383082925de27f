"""Where a deletion request's rows lie, and when they go. The caller commits."""

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from service.domain.deletion import CLOSED, RequestStatus
from service.domain.identity import SYSTEM
from service.store import tenants
from service.store.tables import DeletionJob, DeletionRequest, File, Job

# What the service makes for a job: its requests' rows, and the plan's retain set without some.
MADE = or_(File.id == Job.forget_set, File.id == Job.retain_set)


def release(s: Session, row: DeletionRequest) -> None:
    """`row` has just closed: its own set is due, and those that the service made of it for jobs, whatever became of them.

    Not one that another open request needs: that takes it along when it closes. What a completed request had forgotten is
    kept for as many days as the tenant's rule says. Who still needs a file that is due is asked when it is purged.
    """
    of_row = select(File.id).join(Job, MADE).join(DeletionJob, DeletionJob.job_id == Job.id)
    made = s.scalars(of_row.where(DeletionJob.request_id == row.id, File.created_by == SYSTEM))
    files = sorted({row.forget_set, *made})
    # Two that share a file and close at once: the second waits here, and then finds the first closed.
    s.execute(select(File.id).where(File.id.in_(files)).order_by(File.id).with_for_update(key_share=True))
    kept = timedelta(days=tenants.get(s, row.tenant_id).keep_forgotten_days)
    for file_id in files:
        statuses = _statuses(s, file_id)
        if statuses <= CLOSED:
            _purge_at(s, file_id, func.now() + kept if RequestStatus.COMPLETED in statuses else func.now())


def _statuses(s: Session, file_id: str) -> set[str]:
    """Of the requests whose own set it is, or for whose job the service made it."""
    own = select(DeletionRequest.status).where(DeletionRequest.forget_set == file_id)
    made = select(DeletionRequest.status).join(DeletionJob, DeletionJob.request_id == DeletionRequest.id)
    made = made.join(Job, Job.id == DeletionJob.job_id).join(File, MADE)
    made = made.where(File.id == file_id, File.created_by == SYSTEM)
    return {*s.scalars(own), *s.scalars(made)}


def _purge_at(s: Session, file_id: str, time: ColumnElement[datetime]) -> None:
    """Unless another rule of the tenant's has it go earlier."""
    s.execute(
        update(File)
        .where(File.id == file_id, File.purged_at.is_(None))
        .values(purge_at=func.least(File.purge_at, time))  # of a time and null: the time
        .execution_options(synchronize_session=False)
    )
