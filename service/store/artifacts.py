"""What a job published. Rows are written by jobs.succeed alone, in the moment of the success."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.domain.errors import NotFound
from service.store.tables import Artifact


def of_job(s: Session, job_id: str) -> Sequence[Artifact]:
    return s.scalars(select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.name)).all()


def get(s: Session, job_id: str, artifact_id: str) -> Artifact:
    artifact = s.scalar(select(Artifact).where(Artifact.job_id == job_id, Artifact.id == artifact_id))
    if artifact is None:
        raise NotFound("artifact", artifact_id)
    return artifact


def named(s: Session, job_id: str, name: str) -> Artifact:
    artifact = s.scalar(select(Artifact).where(Artifact.job_id == job_id, Artifact.name == name))
    if artifact is None:
        raise NotFound("artifact", name)
    return artifact
