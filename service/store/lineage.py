"""Jobs that start from the adapter of an earlier one, which may itself have started from an earlier one's.

Those for deletion requests on one model are one line: each starts from what the one before has forgotten, or the model
would know it again.
"""

from collections.abc import Sequence

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import TERMINAL, Status
from service.store import artifacts
from service.store.deletion_jobs import PASSED
from service.store.tables import Artifact, DeletionJob, Job, Model

ADAPTER = "adapter/"  # how the names of its files begin


def why_not(s: Session, job_id: str, model: str) -> str | None:
    """Why a job on this model cannot start from that job's adapter; None: it can."""
    job = s.get(Job, job_id)
    if job is None:
        return str(NotFound("job", job_id))
    if job.model != model:
        return f"job {job_id} was on model {job.model!r}: its adapter is of no use to {model!r}"
    if job.status is not Status.SUCCEEDED:
        return f"job {job_id} is {job.status}; a job starts from the adapter of one that has succeeded"
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


def latest(s: Session, tenant_id: str, model: str) -> str | None:
    """The last job for requests on the model that has forgotten, and released its adapter."""
    passed = _for_requests(tenant_id, model).where(
        Job.status == Status.SUCCEEDED, Job.verdict["result"].astext.in_(PASSED)
    )
    for job in s.scalars(passed.order_by(Job.finished_at.desc())):
        if adapter(s, job.id):
            return job.id
    return None


def under_way(s: Session, tenant_id: str, model: str) -> Job | None:
    """A job for requests on the model that has not ended. The next one starts from its adapter."""
    return s.scalar(_for_requests(tenant_id, model).where(Job.status.not_in(TERMINAL)).limit(1))


def fork(s: Session, tenant_id: str, model: str, parent: str | None) -> str | None:
    """Why a job for requests on the model that starts there would not have forgotten all that the model has; None: it would."""
    if (job := under_way(s, tenant_id, model)) is not None:
        return (
            f"job {job.id}, for deletion requests on the same model, is {job.status}; the next starts from its adapter"
        )
    last = latest(s, tenant_id, model)
    if last is None or (parent is not None and last in [job.id for job in chain(s, parent)]):
        return None
    return f"what job {last} forgot for earlier requests would be known again; a job that starts from {last} can serve them"


def lengthen(s: Session, job: Job) -> None:
    """`job`, which serves requests, is to run; until the commit no other such job on the model is.

    Lock no request before. Raises InvalidTransition where the line would fork.
    """
    s.execute(select(Model.name).where(Model.name == job.model).with_for_update(key_share=True))
    if (reason := fork(s, job.tenant_id, job.model, job.spec.get("parent"))) is not None:
        raise InvalidTransition(reason)


def _for_requests(tenant_id: str, model: str) -> Select[Job]:
    served = select(DeletionJob.job_id).where(DeletionJob.job_id == Job.id)
    return select(Job).where(Job.tenant_id == tenant_id, Job.model == model, served.exists())
