"""What requests can name: the deployment's models, a tenant's benchmarks."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, func
from sqlalchemy.orm import Mapped, mapped_column

from service.store.tables.base import Base, Json, Owned, one_of


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


class Benchmark(Owned, Base):
    """A registered benchmark; the fields of domain.BenchmarkCreate. Its files and its model stay as long as it does."""

    __tablename__ = "benchmarks"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    suite: Mapped[str]
    corpus: Mapped[str]
    sets: Mapped[dict[str, str]]  # the suite's name of a set -> the file
    retrained_model: Mapped[str | None]
    retrained_scores: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
