"""The verbs of a deletion request. The caller commits.

What jobs do to it, and how it is served again, is in deletion_jobs.py; nothing else writes its status. Each verb wants the
row locked and is one compare-and-set on (status, version), with its row in the audit log in the same transaction. A verb
that is given `versions` raises PreconditionFailed unless the request is at one of them; a move that its status does not
allow raises InvalidTransition.
"""

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.domain.deletion import (
    CLOSED,
    TRANSITIONS,
    Closing,
    DeletionCreate,
    Denial,
    Extension,
    Regulation,
    RequestStatus,
    due_extended,
)
from service.domain.errors import FieldProblem, InvalidRequest, InvalidTransition, NotFound, PreconditionFailed
from service.store import audit, deletion_files, outbox, tenancy, tenants
from service.store.ids import new_id
from service.store.rows import WarningRow
from service.store.tables import DeletionApproval, DeletionJob, DeletionRequest, File, Model
from service.webhooks.events import EventType, Subject

R = RequestStatus
FRESH: dict[str, Any] = {"populate_existing": True}  # what a lock waited for may have changed the row


# --- what people ask


def create(
    s: Session,
    asked: DeletionCreate,
    *,
    forget_set: str,
    rows: Sequence[str],
    subjects: Collection[str],
    warnings: Sequence[WarningRow] = (),
) -> DeletionRequest:
    """A request of the session's tenant, that waits for approval or needs none. Raises NotFound for a file or a model.

    Args:
        forget_set: the file's id.
        rows: their digests, in the file's order.
        subjects: their digests.
    """
    file = select(File.id).where(File.id == forget_set, File.purged_at.is_(None))
    if s.scalar(file.with_for_update(key_share=True, read=True)) is None:
        raise NotFound("file", forget_set)
    found = select(Model.name).where(Model.name.in_(asked.models)).order_by(Model.name)
    if missing := set(asked.models) - set(s.scalars(found.with_for_update(key_share=True, read=True))):
        raise NotFound("model", min(missing))
    approvals = tenants.get(s, tenancy.tenant(s)).approvals
    row = DeletionRequest(
        id=new_id("dreq"),
        version=0,  # 1 with the move below
        status=R.RECEIVED,
        external_reference=asked.external_reference,
        regulation=asked.regulation,
        received_at=asked.received_at,
        due_at=asked.deadline,
        approvals_required=approvals,
        models=asked.models,
        forget_set=forget_set,
        rows=len(rows),
        row_digests=list(rows),
        subject_digests=sorted(set(subjects)),
        warnings=[warning._asdict() for warning in warnings],
        metadata_=asked.metadata,
        created_by=tenancy.actor(s),
    )
    s.add(row)
    s.flush()
    told = {"regulation": asked.regulation, "models": asked.models, "rows": len(rows)}
    tell(s, row, R.RECEIVED, told)
    return move(s, row, R.PENDING_APPROVAL) if approvals else move(s, row, R.APPROVED, approved_at=func.now())


def approve(
    s: Session, request_id: str, versions: AbstractSet[int] | None = None, *, leave_out_retained: bool = False
) -> DeletionRequest:
    """By the session's actor, who is not who submitted it. To approve twice is to approve once.

    Args:
        leave_out_retained: see `leave_out`.
    """
    row = locked(s, request_id, versions)
    if leave_out_retained:
        row = leave_out(s, row)
    if s.get(DeletionApproval, (row.id, tenancy.actor(s))) is not None:
        return row
    if row.status != R.PENDING_APPROVAL:
        raise InvalidTransition(f"the request is {row.status}; it waits for no approval")
    if row.created_by == tenancy.actor(s):
        raise InvalidTransition("who submitted a request does not approve it")
    s.add(DeletionApproval(request_id=row.id, approved_by=tenancy.actor(s), submitted_by=row.created_by))
    s.flush()
    count = s.scalars(select(func.count()).where(DeletionApproval.request_id == row.id)).one()
    tell(s, row, "approval", {"approvals": count, "required": row.approvals_required})
    if count < row.approvals_required:
        return write(s, row)
    return move(s, row, R.APPROVED, approved_at=func.now())


def leave_out(s: Session, row: DeletionRequest) -> DeletionRequest:
    """From now on the jobs of plans retain none of its rows. `row` is locked.

    Raises InvalidTransition where a job serves it, once it is closed, and for who submitted it where it wants approval: what a
    plan retains is not theirs to decide alone.
    """
    if row.leave_out_retained:
        return row
    if row.approvals_required and row.created_by == tenancy.actor(s):
        raise InvalidTransition(
            "who submitted a request that wants approval does not leave rows out of what is retained"
        )
    if row.status not in (R.PENDING_APPROVAL, R.APPROVED, R.FAILED):
        raise InvalidTransition(f"the request is {row.status}; what is retained beside it is settled")
    tell(s, row, "retained_rows_left_out", {})
    return write(s, row, leave_out_retained=True)


def deny(s: Session, request_id: str, denial: Denial, versions: AbstractSet[int] | None = None) -> DeletionRequest:
    row = locked(s, request_id, versions)
    told = {"reason": denial.reason, "note": denial.note, "by": tenancy.actor(s)}
    return move(s, row, R.DENIED, {"reason": denial.reason}, denial=told)


def cancel(s: Session, request_id: str, versions: AbstractSet[int] | None = None) -> DeletionRequest:
    """Who asked takes it back. Asking twice is asking once."""
    row = locked(s, request_id, versions)
    if row.status == R.CANCELLED:
        return row
    return move(s, row, R.CANCELLED, status_reason="taken back")


def extend(
    s: Session, request_id: str, extension: Extension, versions: AbstractSet[int] | None = None
) -> DeletionRequest:
    """Once, and before it is due: until then whom it is about must be told. Raises InvalidRequest for a date too late."""
    row = locked(s, request_id, versions)
    now = s.scalars(select(func.now())).one()
    if row.status in CLOSED:
        raise InvalidTransition(f"the request is {row.status}; it has no deadline any more")
    if row.extension is not None:
        raise InvalidTransition("the request was extended before, and can be once")
    if row.due_at <= now:
        raise InvalidTransition("the request is overdue; an extension must be declared before")
    latest = due_extended(Regulation(row.regulation), row.received_at)
    until = extension.due_at or latest
    if until is None:
        raise InvalidRequest(
            FieldProblem("/due_at", "regulation other has no extension of its own: give it", "missing")
        )
    if until <= row.due_at or (latest is not None and until > latest):
        most = f", and at most {latest:%Y-%m-%d %H:%M:%S} UTC" if latest is not None else ""
        detail = f"must be later than {row.due_at:%Y-%m-%d %H:%M:%S} UTC{most}"
        raise InvalidRequest(FieldProblem("/due_at", detail, "deadline"))
    told = {"at": _text(now), "due_before": _text(row.due_at)}
    tell(s, row, "extended", {"due_at": _text(until), "due_before": told["due_before"]})
    return write(s, row, due_at=until, extension={"reason": extension.reason, "by": tenancy.actor(s), **told})


def close(s: Session, request_id: str, closing: Closing, versions: AbstractSet[int] | None = None) -> DeletionRequest:
    """Jobs for it failed, and a person answers for its being completed all the same: not alone, where it wanted approval."""
    row = locked(s, request_id, versions)
    if row.status != R.FAILED:
        raise InvalidTransition(f"the request is {row.status}; only one that failed is closed by a person")
    by = tenancy.actor(s)
    if row.approvals_required and row.created_by == by:
        raise InvalidTransition("who submitted a request that wants approval does not close it")
    return move(s, row, R.COMPLETED, {"closed": True}, closing={"reason": closing.reason, "by": by})


# --- what time does to it


def note_overdue(s: Session, limit: int = 100) -> list[str]:
    """Ids of the open requests whose time has run out since this was last asked."""
    late = select(DeletionRequest).where(
        DeletionRequest.status.not_in(CLOSED), DeletionRequest.overdue_at.is_(None), DeletionRequest.due_at < func.now()
    )
    found = s.scalars(late.order_by(DeletionRequest.id).limit(limit).with_for_update(skip_locked=True)).all()
    for row in found:
        tell(s, row, "overdue", {"due_at": _text(row.due_at)})
        write(s, row, overdue_at=func.now())
    return [row.id for row in found]


# --- what is shown


def get(s: Session, request_id: str) -> DeletionRequest:
    row = s.get(DeletionRequest, request_id)
    if row is None:
        raise NotFound("deletion request", request_id)
    return row


def served(s: Session, job_id: str) -> Sequence[DeletionJob]:
    """The requests that a job serves."""
    return s.scalars(select(DeletionJob).where(DeletionJob.job_id == job_id).order_by(DeletionJob.request_id)).all()


# --- the row


def locked(s: Session, request_id: str, versions: AbstractSet[int] | None = None) -> DeletionRequest:
    wanted = select(DeletionRequest).where(DeletionRequest.id == request_id).with_for_update()
    row = s.scalar(wanted, execution_options=FRESH)
    if row is None:
        raise NotFound("deletion request", request_id)
    if versions is not None and row.version not in versions:
        raise PreconditionFailed(f"the request is at version {row.version}")
    return row


def move(
    s: Session,
    row: DeletionRequest,
    target: RequestStatus,
    data: Mapping[str, Any] | None = None,
    *,
    event: str | None = None,
    **values: Any,
) -> DeletionRequest:
    """`row` must be locked. Raises InvalidTransition if its status does not allow the move.

    Args:
        event: the name under which it is written in the audit log; None: the target's.
    """
    before = RequestStatus(row.status)
    if target not in TRANSITIONS[before]:
        raise InvalidTransition(f"the request is {before}; it cannot become {target}")
    if target in CLOSED:
        values["finished_at"] = func.now()
    tell(s, row, event or target, {"from": before, **(data or {})}, target)
    moved = write(s, row, status=target, **values)
    if target in CLOSED:
        deletion_files.release(s, moved)
    return moved


def write(s: Session, row: DeletionRequest, **values: Any) -> DeletionRequest:
    """The one UPDATE, a compare-and-set on (status, version)."""
    written: DeletionRequest | None = s.scalar(
        update(DeletionRequest)
        .where(DeletionRequest.id == row.id)
        .where(DeletionRequest.status == row.status, DeletionRequest.version == row.version)
        .values(version=DeletionRequest.version + 1, updated_at=func.now(), **values)
        .returning(DeletionRequest),
        execution_options=FRESH | {"synchronize_session": False},
    )
    if written is None:
        raise InvalidTransition("the request has changed meanwhile")
    return written


def tell(
    s: Session, row: DeletionRequest, what: str, data: Mapping[str, Any], status: RequestStatus | None = None
) -> None:
    """In the audit log; and to the tenant's server, if webhooks tell of that. `status`: that of afterwards, if it changes."""
    told = f"deletion_request.{what}"
    audit.write(s, told, "deletion_request", row.id, data, tenant_id=row.tenant_id)
    if told in set(EventType):
        outbox.enqueue(s, row.tenant_id, EventType(told), Subject(row.id, "deletion_request", status or row.status))


def _text(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")
