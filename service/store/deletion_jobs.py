"""What jobs do to the deletion requests that they serve. The caller commits."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.domain.deletion import CLOSED, SERVABLE, RequestStatus
from service.domain.errors import InvalidTransition
from service.domain.job import FORGOTTEN, TERMINAL, Status
from service.store.deletions import FRESH, locked, move, tell, write
from service.store.tables import DeletionJob, DeletionRequest, Job

R = RequestStatus


def serve(s: Session, job: Job, row_numbers: Mapping[str, Sequence[int]]) -> None:
    """`job`, which is new, serves these approved requests; by id: the numbers of their rows in its forget set, from 1.

    Raises InvalidTransition where that is no longer possible.
    """
    for request_id, numbers in sorted(row_numbers.items()):  # in one order, or two jobs could wait for each other
        row = _servable(s, request_id, job.model)
        s.add(DeletionJob(tenant_id=row.tenant_id, request_id=row.id, job_id=job.id, row_numbers=list(numbers)))
        s.flush()
        reason = _standing(s, row).reason  # of another of its models
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
    for row in s.scalars(of_job.with_for_update(of=DeletionRequest), execution_options=FRESH).all():
        if row.status not in CLOSED:
            _follow(s, row)


def fail(s: Session, request_id: str, model: str, reason: str) -> None:
    """No job of the plan for that model can serve it, until the plan is put anew."""
    row = locked(s, request_id)
    if row.status in SERVABLE:  # nobody has denied it or taken it back meanwhile
        _follow(s, write(s, row, unfit={**row.unfit, model: reason}))


class _Standing(NamedTuple):
    passed: set[str]  # models that do not know its rows, by the verdict of a job
    not_known: str | None  # those of them for which nothing had to be trained
    reason: str | None  # what went wrong for others, for which nothing is under way
    running: bool


def _standing(s: Session, row: DeletionRequest) -> _Standing:
    jobs = _jobs(s, row.id)
    last = {job.model: job for job in jobs}
    passed = {job.model: job for job in jobs if job.status is Status.SUCCEEDED and job.result in FORGOTTEN}
    not_known = [_not_known(job) for job in passed.values() if job.result == "NOT_KNOWN"]
    failed = [_failure(job) for job in last.values() if job.model not in passed and job.status in TERMINAL]
    failed += [f"model {model!r}: {reason}" for model, reason in row.unfit.items() if model not in last]
    running = any(job.status not in TERMINAL for job in jobs)
    return _Standing(set(passed), "; ".join(not_known) or None, "; ".join(failed) or None, running)


def _follow(s: Session, row: DeletionRequest) -> None:
    """Completed when no model knows its rows, by the verdict of a job; failed when nothing runs any more and something went
    wrong for one."""
    passed, not_known, reason, running = _standing(s, row)
    if passed >= set(row.models):
        target, reason = R.COMPLETED, not_known
    else:
        target = R.FAILED if reason and not running else R.IN_PROGRESS
    if target != row.status:
        move(s, row, target, {"reason": reason} if target is R.COMPLETED and reason else None, status_reason=reason)
    elif reason != row.status_reason:
        write(s, row, status_reason=reason)


def _not_known(job: Any) -> str:
    if job.forgotten_by is None:
        return f"job {job.id} on model {job.model!r}: the model does not know the rows, so nothing was trained"
    return f"job {job.id} on model {job.model!r}: job {job.forgotten_by} had forgotten the rows already"


def _failure(job: Any) -> str:
    if job.status is Status.SUCCEEDED:
        return f"job {job.id} on model {job.model!r}: the verdict is {job.result}"
    why = f": {job.code}" if job.code else ""
    return f"job {job.id} on model {job.model!r} {job.status}{why}"


def _jobs(s: Session, request_id: str) -> Sequence[Any]:
    """Those that serve it, in the order in which they came: id, model, status, of the verdict the result and the job that had
    forgotten the rows before, failure's code."""
    result, forgotten_by = (Job.verdict[name].astext.label(name) for name in ("result", "forgotten_by"))
    code = Job.failure["code"].astext.label("code")
    of_request = select(Job.id, Job.model, Job.status, result, forgotten_by, code)
    of_request = of_request.join(DeletionJob, DeletionJob.job_id == Job.id).where(DeletionJob.request_id == request_id)
    return s.execute(of_request.order_by(Job.id)).all()
