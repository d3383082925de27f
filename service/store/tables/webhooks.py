"""Webhooks: where messages go, the outbox that is written with what it tells of, and the log of what was tried."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from service.store.tables.base import Base, Owned, one_of

ENDPOINT_STATUS = ("enabled", "disabled")
DELIVERY_STATUS = ("pending", "delivered", "failed", "cancelled")


class WebhookEndpoint(Owned, Base):
    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(primary_key=True)
    url: Mapped[str]
    description: Mapped[str]
    event_types: Mapped[list[str]]  # empty: all
    status: Mapped[str] = mapped_column(server_default=text("'enabled'"))
    status_reason: Mapped[str | None]
    sealed_secret: Mapped[str]
    sealed_old_secret: Mapped[str | None]  # signs too, until
    old_secret_until: Mapped[datetime | None]
    failing_since: Mapped[datetime | None]
    leased_until: Mapped[datetime | None]  # in future: somebody sends; past: when it last had a turn
    created_by: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        CheckConstraint(one_of("status", ENDPOINT_STATUS), name="status"),
        Index("webhook_endpoints_tenant_id_id_idx", "tenant_id", "id"),
    )


class WebhookMessage(Owned, Base):
    """What is sent, to the byte: every attempt at every endpoint signs the same."""

    __tablename__ = "webhook_messages"

    id: Mapped[str] = mapped_column(primary_key=True)
    type: Mapped[str]
    body: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WebhookDelivery(Owned, Base):
    """One message to one endpoint."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[str] = mapped_column(primary_key=True)
    message_id: Mapped[str] = mapped_column(ForeignKey("webhook_messages.id", ondelete="CASCADE"))
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    status: Mapped[str] = mapped_column(server_default=text("'pending'"))
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    next_at: Mapped[datetime | None] = mapped_column(server_default=func.now())  # of a pending one
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(one_of("status", DELIVERY_STATUS), name="status"),
        CheckConstraint("(status = 'pending') = (next_at IS NOT NULL)", name="next_at"),
        Index("webhook_deliveries_due_idx", "endpoint_id", "next_at", postgresql_where=text("status = 'pending'")),
        Index("webhook_deliveries_endpoint_id_id_idx", "endpoint_id", "id"),
        Index("webhook_deliveries_message_id_idx", "message_id"),
    )


class WebhookAttempt(Base):
    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[str] = mapped_column(ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    status: Mapped[int | None]  # of HTTP; null: no answer
    latency_ms: Mapped[int]
    reply: Mapped[str]  # its first 1,000 bytes
    error: Mapped[str | None]
