"""Reverifications: jobs that evaluate an earlier job's adapter under the current verdict rules. The caller commits.

Such a job trains nothing, serves no deletion request and is no job's parent. The earlier job keeps its verdict, its report and
its certificate; it gets an event and an audit entry that name the new ones.
"""

from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import JobSpec, Status, Verdict
from service.store import audit, jobs, lineage, models, moves
from service.store.rows import Event
from service.store.tables import Certificate, Job


def spec(s: Session, job_id: str) -> JobSpec:
    """Of a reverification of the job. Raises NotFound, or InvalidTransition where the job released no adapter of its own."""
    job = jobs.get(s, job_id)
    if (reverified := job.spec.get("reverifies")) is not None:
        raise InvalidTransition(f"the job is itself a reverification; reverify job {reverified}")
    if job.status is not Status.SUCCEEDED:
        raise InvalidTransition(f"the job is {job.status}; only one that has succeeded can be reverified")
    if job.verdict is not None and job.verdict["result"] == "NOT_KNOWN":
        raise InvalidTransition("the job released no adapter to reverify: the model did not know its rows")
    if not lineage.adapter(s, job_id):
        raise InvalidTransition("the job released no adapter to reverify")
    try:
        stored = JobSpec.model_validate(job.spec)
    except ValidationError as error:
        raise InvalidTransition(
            "another version of the service wrote the job's spec; this one cannot read it"
        ) from error
    return stored.model_copy(update={"reverifies": job_id, "deletion_requests": [], "due_at": None})


def create(s: Session, spec: JobSpec, made_on: dict[str, Any], *, rings: bool = False) -> Job:
    """A queued reverification. Raises QuotaExceeded as jobs.create does, and InvalidTransition where a set, a benchmark or the
    model is gone, or the model's name means other weights now.

    Args:
        spec: as `spec` gives it.
        made_on: `base_model` of the earlier job's report.
    """
    try:
        job = jobs.create(s, spec, rings=rings)
    except NotFound as error:
        raise InvalidTransition(f"the job cannot be reverified: {error} any more") from error
    registered = models.get(s, spec.model)
    for what in ("digest", "revision"):
        now, then = getattr(registered, what), made_on[what]
        if now not in (None, then):
            raise InvalidTransition(
                f"the job cannot be reverified: model {spec.model!r} is registered with {what} {now}, and the adapter was made "
                f"on {then}"
            )
    return job


def record_on_original(s: Session, job: Job, certificate: Certificate, digest: str) -> None:
    """The certificate of `job` was issued: the job that it reverifies gets an event, and an entry in the audit log.

    Args:
        digest: SHA-256 of the certificate.
    """
    verdict = Verdict.model_validate(job.verdict)
    original = moves.locked(s, job.spec["reverifies"])
    data = {"job": job.id, "verdict": verdict.result, "rules": verdict.rules, "certificate": certificate.id}
    message = f"job {job.id} reverified the adapter: {verdict.result} by rules {verdict.rules}"
    level = "warn" if verdict.result == "FAILED" else "info"
    moves.write(s, original, [Event("job.reverified", message, data, level)])
    audit.write(
        s, "job.reverified", "unlearning.job", original.id, {**data, "sha256": digest}, tenant_id=original.tenant_id
    )
