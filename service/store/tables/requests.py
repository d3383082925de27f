"""Deletion requests, the legal object; and which jobs serve them."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, Index, UniqueConstraint, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from service.domain.deletion import Regulation, RequestStatus
from service.store.tables.base import Base, Json, Owned, one_of


class DeletionRequest(Owned, Base):
    """Subjects and rows are here only as keyed digests; the rows' text is in the forget set's file, until it is purged."""

    __tablename__ = "deletion_requests"

    id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(server_default=text("1"))
    status: Mapped[str]
    external_reference: Mapped[str | None]
    regulation: Mapped[str]
    received_at: Mapped[datetime]
    due_at: Mapped[datetime]
    approvals_required: Mapped[int]  # as its tenant had it when it came
    approved_at: Mapped[datetime | None]  # when no more were lacking
    overdue_at: Mapped[datetime | None]  # when that was noticed
    extension: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # reason, by, at, due_before
    models: Mapped[list[str]]
    forget_set: Mapped[str] = mapped_column(ForeignKey("files.id"))
    rows: Mapped[int]
    row_digests: Mapped[list[str]] = mapped_column(
        deferred=True
    )  # in the file's order; too many for a list of requests
    subject_digests: Mapped[list[str]] = mapped_column(deferred=True)
    denial: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # reason, note, by
    closing: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # reason, by: closed by a person
    # by model: why no job of its plan can serve the request
    unfit: Mapped[dict[str, str]] = mapped_column(server_default=text("'{}'"))
    # jobs of plans retain none of its rows, whatever the plan's retain set has
    leave_out_retained: Mapped[bool] = mapped_column(server_default=text("false"))
    status_reason: Mapped[str | None]
    warnings: Mapped[list[Json]] = mapped_column(server_default=text("'[]'"))  # code, message: of its submission
    metadata_: Mapped[dict[str, str]] = mapped_column("metadata", server_default=text("'{}'"))
    created_by: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(one_of("status", RequestStatus), name="status"),
        CheckConstraint(one_of("regulation", Regulation), name="regulation"),
        UniqueConstraint("id", "created_by"),  # what an approval refers to
        Index("deletion_requests_tenant_id_id_idx", "tenant_id", "id"),
        Index("deletion_requests_tenant_id_status_due_at_idx", "tenant_id", "status", "due_at"),
        Index("deletion_requests_subject_digests_idx", "subject_digests", postgresql_using="gin"),
    )


class DeletionApproval(Base):
    """Who approves is not who submitted: the database sees to it."""

    __tablename__ = "deletion_approvals"

    request_id: Mapped[str] = mapped_column(primary_key=True)
    approved_by: Mapped[str] = mapped_column(primary_key=True)
    submitted_by: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        ForeignKeyConstraint(
            ["request_id", "submitted_by"],
            ["deletion_requests.id", "deletion_requests.created_by"],
            name="deletion_approvals_request_id_fkey",
        ),
        CheckConstraint("approved_by <> submitted_by", name="four_eyes"),
    )


class DeletionJob(Owned, Base):
    """A job that serves a request, for one of its models."""

    __tablename__ = "deletion_jobs"

    request_id: Mapped[str] = mapped_column(ForeignKey("deletion_requests.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    # of the request's rows in the job's forget set, from 1, in the request's order, each once
    row_numbers: Mapped[list[int]] = mapped_column(JSONB)
    requeued_at: Mapped[datetime | None]  # since then the request waits for another job on the same model

    __table_args__ = (Index("deletion_jobs_job_id_idx", "job_id"),)


class DeletionPlan(Owned, Base):
    """How a model forgets what approved requests name: the job without its forget set, and how many requests share one."""

    __tablename__ = "deletion_plans"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name"), primary_key=True)
    job: Mapped[Json]
    window_seconds: Mapped[int]  # how long the first of a batch waits for others
    requests_max: Mapped[int]
    status_reason: Mapped[str | None]  # why no job could be made of it; null: one can, as far as is known
    created_by: Mapped[str]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
