"""What an auditor asks for a year later: who did what, in an order that cannot be changed unseen, and signed certificates."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Index, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from service.store.tables.base import Base, Json, Owned


class AuditEvent(Owned, Base):
    """Append-only: a trigger of the migration refuses UPDATE, DELETE and TRUNCATE. Each row's hash covers the one before."""

    __tablename__ = "audit_events"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # 1, 2, 3, ... without a gap
    id: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str]
    object_type: Mapped[str]
    object_id: Mapped[str]
    data: Mapped[Json]
    prev_hash: Mapped[str]
    hash: Mapped[str]

    __table_args__ = (Index("audit_events_tenant_id_object_id_seq_idx", "tenant_id", "object_id", "seq"),)


class AuditCheck(Owned, Base):
    """What the last check of a tenant's log found."""

    __tablename__ = "audit_checks"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    seq: Mapped[int]  # of the last entry that held; 0: there was none
    hash: Mapped[str]
    checked_at: Mapped[datetime]
    whole_at: Mapped[datetime]  # when it last began with the first entry
    fault: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))  # seq, kind, detail


class SigningKey(Base):
    """Of the deployment. The newest that is not retired signs; all stay published."""

    __tablename__ = "signing_keys"

    id: Mapped[str] = mapped_column(primary_key=True)  # RFC 7638 thumbprint
    public_jwk: Mapped[dict[str, str]]
    sealed_private: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    retired_at: Mapped[datetime | None]

    __table_args__ = (
        Index("signing_keys_active_idx", text("(true)"), unique=True, postgresql_where=text("retired_at IS NULL")),
    )


class Certificate(Owned, Base):
    """What was decided on a succeeded job: its certificate, or why it gets none."""

    __tablename__ = "certificates"

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    envelope: Mapped[str | None]  # the exact bytes that are given out
    key_id: Mapped[str | None] = mapped_column(ForeignKey("signing_keys.id"))
    audit_seq: Mapped[int | None]  # the head of the audit chain that it names
    refusal: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint(
            "num_nulls(envelope, key_id, audit_seq) = CASE WHEN refusal IS NULL THEN 0 ELSE 3 END", name="decided"
        ),
    )
