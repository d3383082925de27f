"""Jobs that start from the adapter of an earlier one, which may itself have started from an earlier one's.

Those for deletion requests on one model are one line: each starts from what the one before has forgotten, or forgets it
anew, or the model would know it again. A job whose rows the model did not know released no adapter: the line passes it over.
Where an earlier job's adapter had forgotten them, they are rows that this adapter has forgotten.
"""

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import RELEASED, TERMINAL, Status
from service.store import artifacts
from service.store.tables import Artifact, DeletionJob, DeletionRequest, Job, Model
from service.store.tenancy import EVERYBODYS

ADAPTER = "adapter/"  # how the names of its files begin
FORGOTTEN_BY = Job.verdict["forgotten_by"].astext
GOES_ON = func.coalesce(FORGOTTEN_BY, Job.id)  # the job whose adapter has forgotten the rows


def why_not(s: Session, job_id: str, model: str) -> str | None:
    """Why a job on this model cannot start from that job's adapter; None: it can."""
    job = s.get(Job, job_id)
    if job is None:
        return str(NotFound("job", job_id))
    if (reverified := job.spec.get("reverifies")) is not None:
        return (
            f"job {job_id} is a reverification of job {reverified} and has no adapter of its own; start from that job"
        )
    if job.model != model:
        return f"job {job_id} was on model {job.model!r}: its adapter is of no use to {model!r}"
    if job.status is not Status.SUCCEEDED:
        return f"job {job_id} is {job.status}; a job starts from the adapter of one that has succeeded"
    if job.verdict is not None and job.verdict["result"] == "NOT_KNOWN":
        before = job.spec.get("parent")
        return f"job {job_id} released no adapter: the model did not know its rows; start from " + (
            f"job {before}, as it did" if before else "the base model, as it did"
        )
    if not adapter(s, job_id):
        return f"job {job_id} released no adapter to start from"
    return None


def adapter(s: Session, job_id: str) -> Sequence[Artifact]:
    """The files of a job's adapter."""
    return [artifact for artifact in artifacts.of_job(s, job_id) if artifact.name.startswith(ADAPTER)]


def chain(s: Session, job_id: str) -> list[Job]:
    """The job, the one that it started from, and so on to the one that started from the base model."""
    found = [s.get_one(Job, job_id)]
    while parent := found[-1].spec.get("parent"):
        found.append(s.get_one(Job, parent))
    return found


def forgotten_already(s: Session, model: str, job_ids: Collection[str]) -> Sequence[Job]:
    """The jobs on the model whose rows the adapters of those jobs had forgotten already, the oldest first."""
    had = select(Job).where(Job.model == model, FORGOTTEN_BY.in_(job_ids))
    return s.scalars(had.order_by(Job.finished_at, Job.id)).all()


def latest(s: Session, tenant_id: str, model: str) -> str | None:
    """The job from whose adapter the next one for requests on the model starts: the last that has forgotten for some."""
    passed = _passed(model, GOES_ON).where(Job.tenant_id == tenant_id)
    return s.scalar(passed.order_by(Job.finished_at.desc()).limit(1))


def of_model(s: Session, model: str) -> str | None:
    """A job of any tenant from whose adapter the next one for requests on the model may start: of use on these weights alone."""
    return s.scalar(_passed(model, GOES_ON).limit(1), execution_options=EVERYBODYS)


def under_way(s: Session, tenant_id: str, model: str) -> Job | None:
    """A job for requests on the model that has not ended. The next one starts from its adapter."""
    goes_on = select(Job).where(*_for_requests(model), Job.tenant_id == tenant_id, Job.status.not_in(TERMINAL))
    return s.scalar(goes_on.limit(1))


def fork(s: Session, tenant_id: str, model: str, parent: str | None, forgets: AbstractSet[str]) -> str | None:
    """Why a job for requests on the model that starts there would not have forgotten all that the model has; None: it would.

    It starts from the last one's adapter, or forgets anew what those that it passes over forgot for requests, or had forgotten
    already when others were made.

    Args:
        forgets: the digests of its rows.
    """
    if (job := under_way(s, tenant_id, model)) is not None:
        return (
            f"job {job.id}, for deletion requests on the same model, is {job.status}; the next starts from its adapter"
        )
    last = latest(s, tenant_id, model)
    before = [job.id for job in chain(s, parent)] if parent is not None else []
    if last is None or last in before:
        return None
    passed_over = _passed(model, Job.id).where(Job.tenant_id == tenant_id, GOES_ON.not_in(before))
    rows = select(DeletionRequest.row_digests).join(DeletionJob, DeletionJob.request_id == DeletionRequest.id)
    if all(forgets >= set(digests) for digests in s.scalars(rows.where(DeletionJob.job_id.in_(passed_over)))):
        return None
    return (
        f"what job {last} forgot for earlier requests would be known again; a job that starts from {last} can serve them, "
        "or one whose forget set has the rows of all of them"
    )


def lengthen(s: Session, job: Job, forgets: AbstractSet[str] = frozenset()) -> None:
    """`job`, which serves requests, is to run; until the commit no other such job on the model is.

    Lock no request before. Raises InvalidTransition where the line would fork.

    Args:
        forgets: the digests of its rows; none where they are not known, and it starts from the last one's adapter.
    """
    s.execute(select(Model.name).where(Model.name == job.model).with_for_update(key_share=True))
    if (reason := fork(s, job.tenant_id, job.model, job.spec.get("parent"), forgets)) is not None:
        raise InvalidTransition(reason)


def _passed(model: str, what: ColumnElement[str] | InstrumentedAttribute[str]) -> Select[str]:
    """Of the jobs for requests on the model that have forgotten, and released their adapter, or found that another's had."""
    files = select(Artifact.id).where(Artifact.job_id == Job.id, Artifact.name.startswith(ADAPTER))
    released = and_(Job.verdict["result"].astext.in_(RELEASED), files.exists())
    forgotten = or_(released, FORGOTTEN_BY.is_not(None))
    return select(what).where(*_for_requests(model), Job.status == Status.SUCCEEDED, forgotten)


def _for_requests(model: str) -> tuple[ColumnElement[bool], ...]:
    return Job.model == model, select(DeletionJob.job_id).where(DeletionJob.job_id == Job.id).exists()
