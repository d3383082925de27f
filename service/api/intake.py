"""Deletion requests as they come in, and as they are answered with: never a row of theirs, nor a subject."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.api import retained, sets, tokens
from service.api.deps import Parts
from service.api.once import ANEW, Once
from service.api.shapes import REQUESTS_PATH, JobWarning
from service.domain import overlap
from service.domain.deletion import CLOSED, DeletionCreate, DenialReason, Regulation, RequestStatus
from service.domain.errors import FieldProblem, InvalidRequest, NotFound
from service.domain.identity import Principal
from service.domain.job import ModelEntry
from service.domain.rows import Example
from service.store import deletion_reads, deletions, digests, models
from service.store.deletion_reads import Served
from service.store.tables import DeletionRequest

ROWS_MAX = 100_000  # of one request: as many digests lie in its row


class ApprovalShown(BaseModel):
    by: str
    at: datetime


class DenialShown(BaseModel):
    reason: DenialReason
    note: str | None
    by: str


class ExtensionShown(BaseModel):
    reason: str
    by: str
    at: datetime
    due_before: datetime


class ClosingShown(BaseModel):
    reason: str
    by: str


class ServingJob(BaseModel):
    id: str
    model: str


class RequestLinks(BaseModel):
    self: str


class DeletionRequestObject(BaseModel):
    id: str
    object: Literal["deletion_request"] = "deletion_request"
    created_at: datetime
    created_by: str
    updated_at: datetime
    finished_at: datetime | None
    status: RequestStatus
    status_reason: str | None
    external_reference: str | None
    regulation: Regulation
    received_at: datetime
    due_at: datetime
    overdue: bool = Field(description="open, and its time has run out")
    due_in_seconds: int | None = Field(description="at the time of the answer; null once it is closed")
    extension: ExtensionShown | None
    models: list[str]
    forget_set: str
    files: list[str] = Field(
        description="where its rows lie, or lay: its forget set and those of the jobs that serve it"
    )
    rows: int = Field(description="of the forget set")
    approvals: list[ApprovalShown]
    approvals_required: int
    jobs: list[ServingJob] = Field(description="that serve it, in the order in which they came")
    leave_out_retained: bool = Field(
        description="jobs of plans retain none of its rows, whatever the plan's retain set has"
    )
    warnings: list[JobWarning] = Field(
        description="at its submission: `row_retained`, the plan of a model wants rows kept that it wants forgotten"
    )
    denial: DenialShown | None
    closing: ClosingShown | None = Field(description="by a person, though its jobs failed")
    metadata: dict[str, str]
    version: int
    links: RequestLinks


def submit(
    here: Parts, who: Principal, asked: DeletionCreate, once: Once = ANEW, read: retained.Read | None = None
) -> DeletionRequestObject:
    """A request, committed. Raises InvalidRequest; then neither row nor file is kept.

    Args:
        read: what was read for other requests of the same batch, and is added to.
    """
    entries, found, numbers = _models(here, asked), list[str](), dict[bytes, int]()
    long = [tokens.LongRows(here.settings, entry, tokens.JUDGED_BYTES // len(entries)) for entry in entries]
    with sets.opened(here, asked.forget_set, "forget_set") as rows:
        for one in long:
            rows = one.watch(rows)
        rows = _numbered(rows, numbers)
        for digest in digests.row_digests(here.secrets, who.tenant, rows):
            found.append(digest)
            if len(found) > ROWS_MAX:
                detail = f"has more than {ROWS_MAX} rows: make several requests of it"
                raise InvalidRequest(FieldProblem("/forget_set", detail, "too_many"))
    if problems := [problem for one in long for problem in one.problems("/forget_set")]:
        raise InvalidRequest(*problems)
    warnings = list(retained.in_plans(here, who, entries, numbers, {} if read is None else read))
    subjects = [digests.subject_digest(here.secrets, who.tenant, subject) for subject in asked.subjects]
    with sets.inline_files(here, who, {"forget_set": asked.forget_set}) as inline, here.sessions.begin() as s:
        once.first(s)
        sets.insert(s, inline)
        file_id = inline[0].kept.file_id if inline else str(asked.forget_set)
        made = deletions.create(s, asked, forget_set=file_id, rows=found, subjects=subjects, warnings=warnings)
        answer = shown(s, [made])[0]
        once.keep(s, answer, created(answer))
        return answer


def _numbered(rows: Iterator[Example], numbers: dict[bytes, int]) -> Iterator[Example]:
    """The same rows, noted with their numbers."""
    for number, row in enumerate(rows, start=1):
        numbers.setdefault(overlap.exact(row), number)
        yield row


def created(answer: DeletionRequestObject) -> dict[str, str]:
    return {"Location": answer.links.self, "ETag": tag(answer)}


def tag(answer: DeletionRequestObject) -> str:
    return f'"{answer.version}"'


def _models(here: Parts, asked: DeletionCreate) -> list[ModelEntry]:
    """Raises InvalidRequest where one is not registered."""
    entries, problems = [], []
    for index, name in enumerate(asked.models):
        try:
            with here.sessions.begin() as s:
                entries.append(models.get(s, name))
        except NotFound:
            detail = f"model {name!r} is not registered; GET /v1/models lists those that are"
            problems.append(FieldProblem(f"/models/{index}", detail, "model_not_found"))
    if problems:
        raise InvalidRequest(*problems)
    return entries


def shown(s: Session, found: Sequence[DeletionRequest]) -> list[DeletionRequestObject]:
    """In the same order."""
    now = s.scalars(select(func.now())).one()
    ids = [row.id for row in found]
    given, served = deletion_reads.approvals(s, ids), deletion_reads.served_by(s, ids)
    return [
        _object(
            row,
            now,
            [ApprovalShown(by=one.approved_by, at=one.created_at) for one in given if one.request_id == row.id],
            [one for one in served if one.request_id == row.id],
        )
        for row in found
    ]


def _object(
    row: DeletionRequest, now: datetime, approvals: list[ApprovalShown], served: list[Served]
) -> DeletionRequestObject:
    is_open = row.status not in CLOSED
    return DeletionRequestObject(
        id=row.id,
        created_at=row.created_at,
        created_by=row.created_by,
        updated_at=row.updated_at,
        finished_at=row.finished_at,
        status=RequestStatus(row.status),
        status_reason=row.status_reason,
        external_reference=row.external_reference,
        regulation=Regulation(row.regulation),
        received_at=row.received_at,
        due_at=row.due_at,
        overdue=is_open and row.due_at < now,
        due_in_seconds=int((row.due_at - now).total_seconds()) if is_open else None,
        extension=ExtensionShown.model_validate(row.extension) if row.extension else None,
        models=row.models,
        forget_set=row.forget_set,
        files=list(dict.fromkeys([row.forget_set, *(one.forget_set for one in served)])),
        rows=row.rows,
        approvals=approvals,
        approvals_required=row.approvals_required,
        jobs=[ServingJob(id=one.job_id, model=one.model) for one in served],
        leave_out_retained=row.leave_out_retained,
        warnings=[JobWarning.model_validate(warning) for warning in row.warnings],
        denial=DenialShown.model_validate(row.denial) if row.denial else None,
        closing=ClosingShown.model_validate(row.closing) if row.closing else None,
        metadata=row.metadata_,
        version=row.version,
        links=RequestLinks(self=f"{REQUESTS_PATH}/{row.id}"),
    )
