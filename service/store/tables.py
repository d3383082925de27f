"""The tables. Status and other closed sets are text with a CHECK; times are the database's; JSON is jsonb."""

import math
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar, get_args

from sqlalchemy import CheckConstraint, ForeignKey, Index, MetaData, Text, func, text
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, JSONB, TIMESTAMP
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import BigInteger, TypeDecorator

from service.domain.job import HELD, TERMINAL, FilePurpose, Stage, Status

HEAD = "0004"  # the revision of migrations/ that makes these tables; a test holds the two together

Json = dict[str, Any]


class PlainText(TypeDecorator[str]):
    """Postgres has no NUL in text: one in a file's name or in a path of the API must not become a server error."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.replace("\0", "\ufffd")


class FiniteNumber(TypeDecorator[float]):
    """What was not finite is null, as in jsonb (see session.to_json)."""

    impl = DOUBLE_PRECISION
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        return value if value is not None and math.isfinite(value) else None


class StatusText(TypeDecorator[Status]):
    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Status | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Status | None:
        return None if value is None else Status(value)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        }
    )
    type_annotation_map: ClassVar = {
        str: PlainText,
        int: BigInteger,
        float: FiniteNumber,
        datetime: TIMESTAMP(timezone=True),
        Status: StatusText,
        Json: JSONB,
        dict[str, str]: JSONB,
        list[Json]: JSONB,
        list[str]: JSONB,
    }


def one_of(column: str, values: "type[StrEnum] | tuple[str, ...] | frozenset[Status]") -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in sorted(values))})"


class Job(Base):
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
        Index(
            "jobs_claim_idx",
            text("priority DESC"),
            "due_at",  # NULLS LAST is what ascending means
            "queued_at",
            "id",
            postgresql_where=text("status = 'queued'"),
        ),
        Index("jobs_lease_idx", "lease_until", postgresql_where=text(one_of("status", HELD))),
        Index("jobs_status_gpu_class_idx", "status", "gpu_class"),
        Index("jobs_status_id_idx", "status", "id"),
        Index("jobs_model_id_idx", "model", "id"),
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


class File(Base):
    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    purpose: Mapped[str]
    name: Mapped[str]
    key: Mapped[str]  # below the storage root
    bytes: Mapped[int]
    sha256: Mapped[str]
    rows: Mapped[int]

    __table_args__ = (CheckConstraint(one_of("purpose", get_args(FilePurpose)), name="purpose"),)


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


class Model(Base):
    """A registered model; the fields of domain.ModelEntry."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    location: Mapped[str]
    revision: Mapped[str | None]
    digest: Mapped[str | None]
    tokenizer_digest: Mapped[str | None]
    prompt_format: Mapped[Json]
    gpu_class: Mapped[str]
    info: Mapped[Json]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (CheckConstraint(one_of("source", ("path", "hub")), name="source"),)


class Benchmark(Base):
    """A registered benchmark; the fields of domain.BenchmarkCreate. Its files and its model stay as long as it does."""

    __tablename__ = "benchmarks"

    name: Mapped[str] = mapped_column(primary_key=True)
    suite: Mapped[str]
    corpus: Mapped[str]
    sets: Mapped[dict[str, str]]  # the suite's name of a set -> the file
    retrained_model: Mapped[str | None]
    retrained_scores: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Counter(Base):
    """A Prometheus counter that is bumped in the transaction of what it counts."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(primary_key=True)
    labels: Mapped[dict[str, str]] = mapped_column(primary_key=True)
    value: Mapped[int]


class Worker(Base):
    """A worker process, as it last said."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    gpu_classes: Mapped[list[str]]
    vram_gib: Mapped[float] = mapped_column(DOUBLE_PRECISION)
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
