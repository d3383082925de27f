"""Jobs, and what is written down of them while they run and when they have succeeded."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Index, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from service.domain.job import HELD, TERMINAL, Stage, Status
from service.store.tables.base import Base, Json, Owned, one_of


class Job(Owned, Base):
    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[Status]
    status_reason: Mapped[str | None]  # what a job that does not run waits for, or what happened to it
    stage: Mapped[str | None]
    stage_history: Mapped[list[Json]] = mapped_column(
        server_default=text("'[]'")
    )  # stage, attempt, started_at, finished_at
    version: Mapped[int] = mapped_column(server_default=text("1"))  # counts the writes to it
    last_seq: Mapped[int] = mapped_column(server_default=text("0"))  # of its events

    created_by: Mapped[str]  # a principal

    # what was asked; the columns beside `spec` are those by which rows are found
    spec: Mapped[Json]
    model: Mapped[str]
    method: Mapped[str]
    forget_set: Mapped[str]
    retain_set: Mapped[str]
    refusal_set: Mapped[str | None]
    holdout_set: Mapped[str | None]
    priority: Mapped[int]
    due_at: Mapped[datetime | None]
    gpu_class: Mapped[str]
    min_vram_gib: Mapped[float | None]
    external_id: Mapped[str | None]
    metadata_: Mapped[dict[str, str]] = mapped_column("metadata", server_default=text("'{}'"))

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    queued_at: Mapped[datetime | None]  # first; a job that lost its worker keeps its place in the line
    started_at: Mapped[datetime | None]  # the current or last attempt
    finished_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    pause_requested_at: Mapped[datetime | None]

    # who runs it
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    content_failures: Mapped[int] = mapped_column(server_default=text("0"))  # at most limits.max_attempts
    infra_losses: Mapped[int] = mapped_column(server_default=text("0"))  # at most one more than infra_losses_max
    fence: Mapped[int] = mapped_column(server_default=text("0"))  # grows with each claim, never reused
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    beat_at: Mapped[datetime | None]
    rung_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]  # of a queued job that failed or was lost: its next attempt
    micro_batch_tokens: Mapped[int | None]  # positions at once, where memory had no room for the usual number

    # how far it came
    step: Mapped[int] = mapped_column(server_default=text("0"))
    steps_total: Mapped[int | None]
    trained_tokens: Mapped[int] = mapped_column(server_default=text("0"))
    epsilon: Mapped[float | None]  # absolute, nats per token
    base_retain_loss: Mapped[float | None]
    verdict: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    failure: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    warnings: Mapped[list[Json]] = mapped_column(server_default=text("'[]'"))  # code, message

    __table_args__ = (
        CheckConstraint(one_of("status", Status), name="status"),
        CheckConstraint(f"stage IS NULL OR {one_of('stage', Stage)}", name="stage"),
        CheckConstraint(f"({one_of('status', HELD)}) = (lease_until IS NOT NULL)", name="lease"),
        CheckConstraint(f"({one_of('status', TERMINAL)}) = (finished_at IS NOT NULL)", name="finished"),
        CheckConstraint("(status = 'failed') = (failure IS NOT NULL)", name="failure"),
        Index(  # the line of each tenant and GPU class, in the order of claims; see store/line.py
            "jobs_claim_idx",
            "tenant_id",
            "gpu_class",
            text("priority DESC"),
            "due_at",  # NULLS LAST is what ascending means
            "queued_at",
            "id",
            # What keeps a job from being claimed is told in the index: its rows are not read to pass over them.
            text("COALESCE(min_vram_gib, 0)"),
            text("COALESCE(not_before, '-infinity')"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index("jobs_lease_idx", "lease_until", postgresql_where=text(one_of("status", HELD))),
        Index("jobs_status_gpu_class_idx", "status", "gpu_class"),
        Index("jobs_tenant_id_status_id_idx", "tenant_id", "status", "id"),
        Index("jobs_tenant_id_id_idx", "tenant_id", "id"),
        Index("jobs_tenant_id_model_id_idx", "tenant_id", "model", "id"),
    )


class JobEvent(Base):
    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # 1, 2, 3, ... without a gap
    id: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    attempt: Mapped[int]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[Json]

    __table_args__ = (CheckConstraint(one_of("level", ("info", "warn", "error")), name="level"),)


class JobStep(Base):
    """One solver step. A number that was not finite is null."""

    __tablename__ = "job_steps"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    losses: Mapped[Json]
    dual: Mapped[Json]
    violation: Mapped[Json]
    learning_rate: Mapped[float | None]
    gradient_norm: Mapped[float | None]
    tokens: Mapped[int]
    tokens_per_second: Mapped[float | None]
    elapsed_seconds: Mapped[float]
    extra: Mapped[Json]


class JobCheck(Base):
    """One measurement of the whole sets."""

    __tablename__ = "job_checks"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    forget_objective: Mapped[float | None]
    forget_probability: Mapped[float | None]
    retain_loss: Mapped[float | None]
    retain_upper: Mapped[float | None]
    epsilon: Mapped[float | None]
    feasible: Mapped[bool]
    best: Mapped[bool]
    rows: Mapped[int]
    seconds: Mapped[float]


class JobCheckpoint(Base):
    """What an attempt can go on from. It is one only with its row: the bytes may lie there without."""

    __tablename__ = "job_checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[str]  # below the storage root
    bytes: Mapped[int]
    sha256: Mapped[str]  # of the stored bytes
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Artifact(Base):
    __tablename__ = "artifacts"

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    name: Mapped[str]
    key: Mapped[str]  # below the storage root
    media_type: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str]

    __table_args__ = (Index("artifacts_job_id_name_idx", "job_id", "name", unique=True),)
