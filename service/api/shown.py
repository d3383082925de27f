"""Jobs as they are answered with, and what of an answer is beside the job's own row. The caller's transaction."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from sqlalchemy import Connection, and_, bindparam, select
from sqlalchemy.orm import Session

from service.api import polling, shapes
from service.api.shapes import JobObject
from service.domain.job import Budget, Status
from service.store import artifacts, evidence, keys, quotas, reads, workers
from service.store.secrets import Secrets
from service.store.tables import ApiKey, Job, Model

BASE = (Model.name, Model.source, Model.location, Model.revision, Model.digest, Model.tokenizer_digest)
BASES = select(*BASE).where(Model.name.in_(bindparam("names", expanding=True)))
GLANCED = (
    *(Job.id, Job.version, Job.status, Job.status_reason, Job.not_before, Job.gpu_class, Job.min_vram_gib, Job.stage),
    *(Job.stage_history, Job.step, Job.updated_at, Job.spec["budget"].label("budget"), *BASE),
)
# Made once: polls ask them, and to put them together takes longer than the answer. A job is the tenant's, or not there.
OF_TENANT = (
    select(Job.tenant_id, *GLANCED)
    .outerjoin(Model, Model.name == Job.model)
    .where(Job.id == bindparam("job_id"), Job.tenant_id == bindparam("tenant_id"))
)
OF_KEY = (  # the key's row, whatever job is asked for
    keys.LIVE.add_columns(*GLANCED)
    .outerjoin(Job, and_(Job.id == bindparam("job_id"), Job.tenant_id == ApiKey.tenant_id))
    .outerjoin(Model, Model.name == Job.model)
)
BESIDE = {Status.QUEUED, Status.SUCCEEDED}  # of other jobs `_besides` tells nothing


class Glance(NamedTuple):
    """As much of a job as tells a client that nothing has changed."""

    status: Status
    headers: dict[str, str]  # what the whole answer would have


class Beside(NamedTuple):
    """What can change while the job's row, and so its version, stays as it is."""

    place: int | None = None
    waits_for: str | None = None
    certificate: str | None = None


def job_object(s: Session, job: Job) -> JobObject:
    return job_objects(s, [job])[0]


def job_objects(s: Session, found: Sequence[Job]) -> list[JobObject]:
    """In the same order. A page of jobs costs as many queries as one job."""
    rows: Any = s.execute(BASES, {"names": [*{job.model for job in found}]})
    base_models = {row.name: shapes.base_model(row) for row in rows}
    published = artifacts.of_jobs(s, [job.id for job in found if job.status is Status.SUCCEEDED])
    return [
        shapes.job_object(
            job,
            base_models.get(job.model),
            more.place,
            published.get(job.id, ()),
            more.certificate,
            more.waits_for,
        )
        for job, more in zip(found, _besides(s, found), strict=True)
    ]


def of_key(connection: Connection, secrets: Secrets, secret: str, job_id: str) -> keys.Recognised | None:
    """As keys.recognise, and with the same statement the row for `glance`; its job has no id where there is none."""
    return keys.recognise(connection, secrets, secret, OF_KEY, job_id=job_id)


def of_tenant(connection: Connection, tenant_id: str, job_id: str) -> Any:
    """The row for `glance`; None: there is no such job."""
    return connection.execute(OF_TENANT, {"job_id": job_id, "tenant_id": tenant_id}).one_or_none()


def beside(connection: Connection, row: Any) -> Beside:
    return _besides(connection, [row])[0]


def glance(row: Any, beside: Beside) -> Glance:
    """Cheaper than the whole, and the same ETag: whatever is not beside the job's row has a version."""
    place, waits_for, certificate = beside
    base_model = shapes.base_model(row) if row.name is not None else None  # an administrator has removed it
    tag = polling.tag(row.version, base_model, place, shapes.status_reason(row, place, waits_for), certificate)
    try:
        eta = shapes.eta_seconds(row, Budget.model_validate(row.budget, extra="ignore"))
    except ValidationError:  # another version's
        eta = None
    return Glance(row.status, polling.told(tag, row.status, eta))


def _besides(s: Session | Connection, found: Sequence[Any]) -> list[Beside]:
    """Of each; `found`: jobs, or rows with their tenants and the columns of GLANCED."""
    waiting = [job.id for job in found if job.status is Status.QUEUED]
    places = reads.places(s, waiting)
    heard = workers.heard(s) if waiting else []
    at_most = quotas.at_most(s, {job.tenant_id for job in found if job.status is Status.QUEUED})
    certificates = evidence.ids(s, [job.id for job in found if job.status is Status.SUCCEEDED])
    return [Beside(places.get(job.id), waits_for(job, heard, at_most), certificates.get(job.id)) for job in found]


def waits_for(job: Any, heard: Sequence[Any], at_most: dict[str, int]) -> str | None:
    """Why no worker takes it now, whatever is before it in the line."""
    nobody = workers.nobody_runs(job, heard)
    if nobody is None and job.status is Status.QUEUED and (bound := at_most.get(job.tenant_id)) is not None:
        return f"the tenant runs as many jobs at once as it may: {bound}"
    return nobody
