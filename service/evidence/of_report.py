"""What a certificate says, taken from the job's report and from what the service alone knows."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from service.domain.job import GateResult, Verdict
from service.domain.report import AdapterFile, Figure, Parent, Report
from service.evidence import canonical
from service.evidence.certificate import (
    LIMITATIONS,
    BaseModelRef,
    Bound,
    DigestSet,
    Environment,
    GateOutcome,
    Measure,
    Method,
    Outcome,
    ParentRef,
    Reverification,
    SetRef,
    Unlearning,
    subjects,
)
from service.evidence.chain import Head

ADAPTER = "adapter/"  # what the names of an adapter's files begin with among a job's artifacts


class Known(NamedTuple):
    """What does not stand in a report. Digests as "sha256:…" or "hmac-sha256:…"."""

    report_sha256: str  # of the stored report.json, 64 hex digits
    deletion_requests: Sequence[str]
    forget_digest: str
    retain_digest: str
    started_at: datetime
    finished_at: datetime
    audit_head: Head


def files(report: Report) -> dict[str, str]:
    """What the certificate is about: name below its folder -> SHA-256 of each file.

    The adapter that was released, by this job or by the one that it reverifies. Where the model did not know the rows, none was:
    then the files of the base model, or of the adapter that had forgotten them already. Empty where there are none.
    """
    if report.verdict.result != "NOT_KNOWN":
        return _below(report.released.files)
    if report.verdict.forgotten_by is None:
        return dict(report.base_model.files)
    return _below(report.parent.files) if report.parent else {}


def predicate(report: Report, known: Known) -> Unlearning | Reverification:
    asked, base, where = report.asked, report.base_model, report.environment
    common = Unlearning(
        job_id=report.job_id,
        deletion_requests=list(known.deletion_requests),
        parent=_parent(report.parent) if report.parent else None,
        base_model=BaseModelRef(
            id=base.name,
            source=base.source,
            revision=base.revision,
            digest=base.digest,
            tokenizer_digest=base.tokenizer_digest,
        ),
        forget_set=SetRef(digest=known.forget_digest, rows=report.forget_set.rows),
        retain_set=SetRef(digest=known.retain_digest, rows=report.retain_set.rows),
        method=Method(type=asked.method, hyperparameters=asked.hyperparameters, seed=str(asked.seed)),
        constraint=Bound(
            epsilon=report.constraint.epsilon,
            before=report.constraint.before,
            measured=report.constraint.upper,
            feasible=report.constraint.satisfied,
        ),
        verdict=_outcome(report.verdict),
        figures=[_measure(figure) for figure in report.figures],
        report=DigestSet(sha256=known.report_sha256),
        environment=Environment(
            code_version=where.code_version,
            lock_digest=where.installed,
            hardware=f"{where.device}; {where.platform}",
            versions={"python": where.python} | where.versions,
        ),
        started_at=canonical.instant(known.started_at),
        finished_at=canonical.instant(known.finished_at),
        audit_head=known.audit_head,
        limitations=[*report.caveats, *LIMITATIONS],
    )
    return common if report.reverifies is None else Reverification(**dict(common), reverifies=report.reverifies)


def _below(files: Sequence[AdapterFile]) -> dict[str, str]:
    return {file.name.removeprefix(ADAPTER): file.sha256 for file in files}


def _parent(parent: Parent) -> ParentRef:
    return ParentRef(job_id=parent.job_id, files=subjects(_below(parent.files)))


def _outcome(verdict: Verdict) -> Outcome:
    return Outcome(**dict(verdict) | {"gates": [_gate(gate) for gate in verdict.gates]})


def _gate(gate: GateResult) -> GateOutcome:
    return GateOutcome(**gate.model_dump())


def _measure(figure: Figure) -> Measure:
    return Measure(set=figure.set, metric=figure.metric, before=figure.before, after=figure.after, rows=figure.rows)
