"""Jobs as they are answered with, and what of an answer is beside the job's own row. The caller's transaction."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.api import shapes
from service.api.shapes import JobObject
from service.domain.errors import NotFound
from service.domain.job import ModelEntry, Status
from service.store import artifacts, evidence, models, reads, workers
from service.store.tables import Job


def job_object(s: Session, job: Job) -> JobObject:
    return job_objects(s, [job])[0]


def job_objects(s: Session, found: Sequence[Job]) -> list[JobObject]:
    """In the same order. A page of jobs costs as many queries as one job, but for one per model that they name."""
    waiting = [job.id for job in found if job.status is Status.QUEUED]
    places = reads.places(s, waiting)
    heard = workers.heard(s) if waiting else []
    published = artifacts.of_jobs(s, [job.id for job in found if job.status is Status.SUCCEEDED])
    certificates = evidence.ids(s, list(published))
    entries = {name: _entry(s, name) for name in {job.model for job in found}}
    return [
        shapes.job_object(
            job,
            entries[job.model],
            places.get(job.id),
            published.get(job.id, ()),
            certificates.get(job.id),
            workers.nobody_runs(job, heard),
        )
        for job in found
    ]


def _entry(s: Session, name: str) -> ModelEntry | None:
    try:
        return models.get(s, name)
    except NotFound:  # an administrator has removed it
        return None
