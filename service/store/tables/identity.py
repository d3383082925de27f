"""Who may ask: tenants and their API keys; and what was asked already."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from service.store.tables.base import Base, Owned


class Tenant(Base):
    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(primary_key=True)  # a name that people choose
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    approvals: Mapped[int] = mapped_column(server_default=text("0"))  # persons who must approve a deletion request
    keep_files_days: Mapped[int | None]  # after which an uploaded set is purged; null: when somebody deletes it
    # that what a completed deletion request had forgotten is kept, for later jobs to measure it again
    keep_forgotten_days: Mapped[int] = mapped_column(server_default=text("0"))
    max_running_jobs: Mapped[int | None]  # at once; more of them wait, whatever is free. null: no bound
    max_open_jobs: Mapped[int | None]  # that have not ended; more are refused. null: no bound

    __table_args__ = (
        CheckConstraint("approvals BETWEEN 0 AND 2", name="approvals"),
        CheckConstraint("keep_files_days >= 0", name="keep_files_days"),
        CheckConstraint("keep_forgotten_days >= 0", name="keep_forgotten_days"),
        CheckConstraint("max_running_jobs > 0", name="max_running_jobs"),
        CheckConstraint("max_open_jobs > 0", name="max_open_jobs"),
    )


class ApiKey(Owned, Base):
    """The secret itself is shown once and kept nowhere."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]  # for people
    prefix: Mapped[str] = mapped_column(unique=True)  # of the secret: finds the row, and the key in a log or a leak
    digest: Mapped[str]  # HMAC-SHA-256 of the secret, hex
    scopes: Mapped[list[str]]
    created_by: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # to the minute

    __table_args__ = (Index("api_keys_tenant_id_id_idx", "tenant_id", "id"),)


class IdempotencyKey(Owned, Base):
    """What was answered to a request, for those that repeat it; written in the transaction of what it made."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    principal: Mapped[str] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)  # "POST /v1/unlearning/jobs"
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]  # keyed digest of the canonical body
    status: Mapped[int]
    body: Mapped[str]  # sealed: it may hold a secret that is shown once
    headers: Mapped[dict[str, str]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (Index("idempotency_keys_created_at_idx", "created_at"),)
