"""Jobs that start from the adapter of an earlier one, which may itself have started from an earlier one's."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.domain.errors import NotFound
from service.domain.job import Status
from service.store import artifacts, jobs
from service.store.tables import Artifact, Job

ADAPTER = "adapter/"  # how the names of its files begin


def why_not(s: Session, job_id: str, model: str) -> str | None:
    """Why a job on this model cannot start from that job's adapter; None: it can."""
    try:
        job = jobs.get(s, job_id)
    except NotFound as error:
        return str(error)
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
    found = [jobs.get(s, job_id)]
    while parent := found[-1].spec.get("parent"):
        found.append(jobs.get(s, parent))
    return found
