"""Certificates: issued once for each succeeded job that released an adapter, or whose rows the model did not know; never changed.

Every succeeded job is decided on once: it gets a certificate, or a row that says why not, so that nobody asks again.
"""

from collections.abc import Collection, Sequence
from hashlib import sha256

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Connection, and_, func, select
from sqlalchemy.orm import Session

from service.domain import modelfiles
from service.domain.errors import NotFound, StorageDamaged
from service.domain.job import Status
from service.domain.report import Report
from service.evidence import certificate, dsse, of_report
from service.store import artifacts, audit, deletions, evidence_keys, lineage, moves, outbox, reverifications
from service.store.ids import new_id
from service.store.rows import Event
from service.store.secrets import SealBroken, Secrets
from service.store.session import Sessions
from service.store.storage import Storage
from service.store.tables import Artifact, Certificate, File, Job, Model
from service.webhooks.events import EventType, Subject

REPORT = "report.json"


def due(s: Session, limit: int = 100) -> Sequence[str]:
    """Ids of succeeded jobs that were not decided on, the oldest first."""
    return s.scalars(select(Job.id).where(_undecided()).order_by(Job.finished_at).limit(limit)).all()


def waiting(s: Session) -> int:
    """The number of succeeded jobs that were not decided on."""
    return s.scalar(select(func.count()).select_from(Job).where(_undecided())) or 0


def _undecided() -> ColumnElement[bool]:
    decided = select(Certificate.id).where(Certificate.job_id == Job.id)
    return and_(Job.status == Status.SUCCEEDED, ~decided.exists())


def decide(sessions: Sessions, storage: Storage, secrets: Secrets, job_id: str) -> Certificate | None:
    """A succeeded job's certificate, or why it gets none; None: it was decided on already.

    Raises StorageUnavailable, or NotFound for the report's bytes: the storage is away, and may come back.
    """
    with sessions.begin() as s:
        report = _report(s, job_id)
    content = b"".join(storage.read(report.key)) if report else b""
    with sessions.begin() as s:
        job = moves.locked(s, job_id)
        if of_job(s, job_id) is not None:
            return None
        row = Certificate(id=new_id("ucert"), job_id=job_id, tenant_id=job.tenant_id)
        key = evidence_keys.active(s, secrets)
        try:
            statement = _statement(s, job, report, content)
            envelope = dsse.to_json(certificate.issue(statement, key))
        except ValueError as error:  # also of what has no canonical form
            row.refusal = str(error)
        else:
            row.envelope, row.key_id, row.audit_seq = envelope.decode(), key.id, statement.predicate.audit_head.seq
            _tell(s, job, row, sha256(envelope).hexdigest())
        s.add(row)
    return row


def of_job(s: Session, job_id: str) -> Certificate | None:
    return s.scalar(select(Certificate).where(Certificate.job_id == job_id))


def generic_result(s: Session, secrets: Secrets, row: Certificate) -> bytes:
    """What an issued certificate says, in in-toto's test-result v0.1: an envelope, signed by the key that signs now.

    Raises StorageDamaged where the stored certificate is not as it was signed, else this would sign whatever somebody put there;
    and where a key is of another MASTER_KEY.
    """
    assert row.envelope is not None
    assert row.key_id is not None
    try:
        signed = dsse.from_json(row.envelope.encode())
        dsse.signers(signed, {row.key_id: evidence_keys.of_id(s, secrets, row.key_id).private.public_key()})
        key = evidence_keys.active(s, secrets)
    except (ValueError, SealBroken) as error:
        raise StorageDamaged(f"certificate {row.id} cannot be attested: {error}") from error
    return dsse.to_json(certificate.issue(certificate.generic_result(certificate.read(signed)), key))


def ids(s: Session | Connection, job_ids: Collection[str]) -> dict[str, str]:
    """Of the certificates of those jobs that have one, by job."""
    if not job_ids:
        return {}
    rows = select(Certificate.job_id, Certificate.id).where(
        Certificate.job_id.in_(job_ids), Certificate.refusal.is_(None)
    )
    return {row.job_id: row.id for row in s.execute(rows)}


def _report(s: Session, job_id: str) -> Artifact | None:
    try:
        return artifacts.named(s, job_id, REPORT)
    except NotFound:
        return None


def _statement(s: Session, job: Job, artifact: Artifact | None, content: bytes) -> certificate.Certificate:
    """Raises ValueError with the reason why the job gets no certificate."""
    report = _read(job, artifact, content)
    files = _subject(s, job, report)
    head = audit.head(s, job.tenant_id)
    if head is None or job.started_at is None or job.finished_at is None:
        raise ValueError("it ran before there was an audit log")
    digests = {
        row.id: row.digest for row in s.scalars(select(File).where(File.id.in_((job.forget_set, job.retain_set))))
    }
    known = of_report.Known(
        report_sha256=sha256(content).hexdigest(),
        deletion_requests=[one.request_id for one in deletions.served(s, job.id)],
        forget_digest=digests[job.forget_set],
        retain_digest=digests[job.retain_set],
        started_at=job.started_at,
        finished_at=job.finished_at,
        audit_head=head,
    )
    return certificate.certify(files, of_report.predicate(report, known))


def _read(job: Job, artifact: Artifact | None, content: bytes) -> Report:
    if artifact is None:
        raise ValueError("it published no report")
    if sha256(content).hexdigest() != artifact.sha256:
        raise ValueError("the stored report is not the one that was published")
    try:
        report = Report.model_validate_json(content)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, one["loc"])) for one in error.errors()[:3])
        raise ValueError(f"its report is of another version and cannot be read: {fields}") from error
    if report.job_id != job.id:
        raise ValueError(f"its report is that of job {report.job_id}")
    if report.reverifies != job.spec.get("reverifies"):
        raise ValueError("its report is not on the adapter that it was to evaluate")
    if not report.released.published and report.verdict.result != "NOT_KNOWN":
        raise ValueError("no adapter was released")
    return report


def _subject(s: Session, job: Job, report: Report) -> dict[str, str]:
    """The files that the certificate is about. Raises ValueError unless they are those that the service knows."""
    files, verdict, base = of_report.files(report), report.verdict, report.base_model
    if verdict.result == "NOT_KNOWN" and verdict.forgotten_by is None:
        registered = s.scalar(select(Model.digest).where(Model.name == job.model))
        found = modelfiles.digest_files(files)[0]
        if found != base.digest or registered not in (None, found):
            raise ValueError("the base model's files that the report names are not those of its digest")
        return files
    if verdict.forgotten_by not in (None, job.spec.get("parent")):
        raise ValueError(f"job {verdict.forgotten_by} is not the one that it started from")
    published = lineage.adapter(s, verdict.forgotten_by or report.reverifies or job.id)
    if files != {one.name.removeprefix(lineage.ADAPTER): one.sha256 for one in published}:
        raise ValueError("the adapter that the report names is not the one that was published")
    return files


def _tell(s: Session, job: Job, row: Certificate, digest: str) -> None:
    told = {"certificate": row.id, "key": row.key_id}
    moves.write(s, job, [Event("certificate.issued", f"certificate {row.id} was issued", told)])
    told["sha256"] = digest
    audit.write(s, "certificate.issued", "unlearning.job", job.id, told, tenant_id=job.tenant_id)
    if "reverifies" in job.spec:
        reverifications.record_on_original(s, job, row, digest)
    outbox.enqueue(s, job.tenant_id, EventType.CERTIFICATE_ISSUED, Subject(row.id, "certificate", "issued"))
