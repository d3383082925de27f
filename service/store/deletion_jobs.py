"""What jobs do to the deletion requests that they serve, and how those are served again. The caller commits.

A job that fails on rows of its forget set fails the requests that they belong to. The others that it was to serve are requeued:
they wait for another job on the model, as if this one had not been.
"""

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from service.domain.deletion import CLOSED, SERVABLE, RequestStatus
from service.domain.errors import InvalidTransition
from service.domain.job import FORGOTTEN, TERMINAL, Status
from service.store.deletions import FRESH, leave_out, locked, move, tell, write
from service.store.tables import DeletionJob, DeletionRequest, Job

R = RequestStatus
NAMED_ROWS_MAX = 20
REQUEUED = "requeued"  # the event


def serve(s: Session, job: Job, row_numbers: Mapping[str, Sequence[int]]) -> None:
    """`job`, which is new, serves these approved requests; by id: the numbers of their rows in its forget set, from 1, in the
    request's order, each once.

    Raises InvalidTransition where that is no longer possible.
    """
    for request_id, numbers in sorted(row_numbers.items()):  # in one order, or two jobs could wait for each other
        row = _servable(s, request_id, job.model)
        s.add(DeletionJob(tenant_id=row.tenant_id, request_id=row.id, job_id=job.id, row_numbers=list(numbers)))
        s.flush()
        reason = _standing(s, row).failed  # for another of its models
        if row.status == R.IN_PROGRESS:
            tell(s, row, "served", {"job": job.id})
            write(s, row, status_reason=reason)
        else:
            move(s, row, R.IN_PROGRESS, {"job": job.id}, status_reason=reason)


def serve_again(s: Session, job: Job) -> None:
    """`job`, which failed, is to run once more for its requests. Raises InvalidTransition unless it can serve all of them."""
    of_job = select(DeletionJob.request_id).where(DeletionJob.job_id == job.id).order_by(DeletionJob.request_id)
    for request_id in s.scalars(of_job).all():
        _servable(s, request_id, job.model)
    _set_requeued(s, job.id, None)


def serves(s: Session, job_id: str) -> bool:
    return s.scalar(select(DeletionJob.job_id).where(DeletionJob.job_id == job_id).limit(1)) is not None


def why_not(s: Session, row: DeletionRequest, model: str) -> str | None:
    """Why a job on this model cannot serve the request; None: it can."""
    if row.status not in SERVABLE:
        return f"request {row.id} is {row.status}; a job serves one that is approved"
    if model not in row.models:
        return f"request {row.id} does not name model {model!r}"
    live = next((job for job in _jobs(s, row.id) if job.model == model and job.status not in TERMINAL), None)
    return None if live is None else f"job {live.id} serves request {row.id} already, on the same model"


def _servable(s: Session, request_id: str, model: str) -> DeletionRequest:
    """Locked. Raises InvalidTransition."""
    row = locked(s, request_id)
    if (reason := why_not(s, row, model)) is not None:
        raise InvalidTransition(reason)
    return row


def job_moved(s: Session, job: Job) -> None:
    """`job`, which is locked, has ended, or goes on after an end: so do the requests that it serves."""
    of_job = select(DeletionRequest).join(DeletionJob, DeletionJob.request_id == DeletionRequest.id)
    of_job = of_job.where(DeletionJob.job_id == job.id).order_by(DeletionRequest.id)
    requests = s.scalars(of_job.with_for_update(of=DeletionRequest), execution_options=FRESH).all()
    if job.failure is not None and job.failure.get("forget_rows"):
        _requeue_unaffected(s, job, set(job.failure["forget_rows"]))
    for row in requests:
        if row.status not in CLOSED:
            _follow(s, row)


def _requeue_unaffected(s: Session, job: Job, failed: AbstractSet[int]) -> None:
    """Requeues the requests that have none of the rows that the job failed on. There is none left where it served one alone."""
    links = s.scalars(select(DeletionJob).where(DeletionJob.job_id == job.id)).all()
    unaffected = [link.request_id for link in links if failed.isdisjoint(link.row_numbers)]
    _set_requeued(s, job.id, func.now(), unaffected)


def requeue(
    s: Session, request_id: str, versions: AbstractSet[int] | None = None, *, leave_out_retained: bool = False
) -> DeletionRequest:
    """One that failed waits for another job, for each of its models that still knows its rows. Requeuing one that waits changes
    nothing. Raises InvalidTransition for any other; PreconditionFailed unless it is at one of the versions.

    Args:
        leave_out_retained: see deletions.leave_out.
    """
    row = locked(s, request_id, versions)
    if leave_out_retained:
        row = leave_out(s, row)
    if row.status == R.APPROVED:
        return row
    if row.status != R.FAILED:
        raise InvalidTransition(f"the request is {row.status}; only one that failed can be requeued")
    passed = _standing(s, row).passed
    for job in _jobs(s, row.id):
        if job.model not in passed:
            _set_requeued(s, job.id, func.now(), [row.id])
    return _follow(s, write(s, row, unfit={}), REQUEUED)


def _set_requeued(
    s: Session, job_id: str, time: ColumnElement[datetime] | None, request_ids: Collection[str] | None = None
) -> None:
    """Of these requests that the job serves; None: of all."""
    links = update(DeletionJob).where(DeletionJob.job_id == job_id)
    if request_ids is not None:
        links = links.where(DeletionJob.request_id.in_(request_ids))
    s.execute(links.values(requeued_at=time), execution_options={"synchronize_session": False})


def fail(s: Session, request_id: str, model: str, reason: str) -> None:
    """No job of the plan for that model can serve it, until the plan is put anew."""
    row = locked(s, request_id)
    if row.status in SERVABLE:  # nobody has denied it or taken it back meanwhile
        _follow(s, write(s, row, unfit={**row.unfit, model: reason}))


class _Standing(NamedTuple):
    passed: set[str]  # models that do not know its rows, by the verdict of a job
    not_known: str | None  # those of them for which nothing had to be trained
    failed: str | None  # what went wrong for others, for which nothing is under way
    requeued: str | None  # what went wrong for those for which it waits for another job
    served: bool  # by a job that is under way, or has ended and counts
    running: bool


def _standing(s: Session, row: DeletionRequest) -> _Standing:
    jobs = _jobs(s, row.id)
    last = {job.model: job for job in jobs}
    passed = {job.model: job for job in jobs if job.status is Status.SUCCEEDED and job.result in FORGOTTEN}
    not_known = [_not_known(job) for job in passed.values() if job.result == "NOT_KNOWN"]
    ended = [job for job in last.values() if job.model not in passed and job.status in TERMINAL]
    failed = [_failure(row, job) for job in ended if job.requeued_at is None]
    unserved = {model for model in row.models if model not in last or last[model].requeued_at is not None}
    failed += [f"model {model!r}: {reason}" for model, reason in row.unfit.items() if model in unserved]
    requeued = [_failure(row, job) for job in ended if job.model in unserved and job.model not in row.unfit]
    return _Standing(
        passed=set(passed),
        not_known="; ".join(not_known) or None,
        failed="; ".join(failed) or None,
        requeued="; ".join(f"waits for another job: {reason}" for reason in requeued) or None,
        served=any(job.requeued_at is None for job in jobs),
        running=any(job.status not in TERMINAL for job in jobs),
    )


def _follow(s: Session, row: DeletionRequest, event: str | None = None) -> DeletionRequest:
    """Completed when no model knows its rows, by the verdict of a job; failed when nothing runs any more and something went
    wrong for one; approved again when it waits for another job and no job counts.

    Args:
        event: as of deletions.move.
    """
    standing = _standing(s, row)
    reason = standing.failed or standing.requeued
    if standing.passed >= set(row.models):
        target, reason = R.COMPLETED, standing.not_known
    elif standing.failed and not standing.running:
        target = R.FAILED
    else:
        target = R.IN_PROGRESS if standing.served else R.APPROVED
    if target != row.status:
        data = {"reason": reason} if target is R.COMPLETED and reason else None
        event = REQUEUED if target is R.APPROVED else event
        return move(s, row, target, data, event=event, status_reason=reason)
    return write(s, row, status_reason=reason) if reason != row.status_reason else row


def _not_known(job: Any) -> str:
    if job.forgotten_by is None:
        return f"job {job.id} on model {job.model!r}: the model does not know the rows, so nothing was trained"
    return f"job {job.id} on model {job.model!r}: job {job.forgotten_by} had forgotten the rows already"


def _failure(row: DeletionRequest, job: Any) -> str:
    if job.status is Status.SUCCEEDED:
        return f"job {job.id} on model {job.model!r}: the verdict is {job.result}"
    why = f": {job.code}" if job.code else ""
    return f"job {job.id} on model {job.model!r} {job.status}{why}{_whose_rows(row, job)}"


def _whose_rows(row: DeletionRequest, job: Any) -> str:
    if not job.forget_rows:
        return ""
    numbers = dict[str, int]()
    for number, digest in enumerate(row.row_digests, start=1):
        numbers.setdefault(digest, number)
    failed = set(job.forget_rows)
    own = [number for number, place in zip(numbers.values(), job.row_numbers, strict=False) if place in failed]
    if not own:
        return ", on rows that are not this request's"
    named = ", ".join(map(str, own[:NAMED_ROWS_MAX])) + (", ..." if len(own) > NAMED_ROWS_MAX else "")
    return f", on {'row' if len(own) == 1 else 'rows'} {named} of this request"


def _jobs(s: Session, request_id: str) -> Sequence[Any]:
    """Those that serve it, in the order in which they came: id, model, status, of the verdict the result and the job that had
    forgotten the rows before, failure's code and rows, where the request's rows are, and since when it waits for another."""
    result, forgotten_by = (Job.verdict[name].astext.label(name) for name in ("result", "forgotten_by"))
    code, forget_rows = Job.failure["code"].astext.label("code"), Job.failure["forget_rows"].label("forget_rows")
    of_request = select(Job.id, Job.model, Job.status, result, forgotten_by, code, forget_rows)
    of_request = of_request.add_columns(DeletionJob.row_numbers, DeletionJob.requeued_at)
    of_request = of_request.join(DeletionJob, DeletionJob.job_id == Job.id).where(DeletionJob.request_id == request_id)
    return s.execute(of_request.order_by(Job.id)).all()
