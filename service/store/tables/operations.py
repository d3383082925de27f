"""What the running of the service itself writes down."""

from datetime import datetime

from sqlalchemy import func, text
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION
from sqlalchemy.orm import Mapped, mapped_column

from service.store.tables.base import Base


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
    slots: Mapped[int] = mapped_column(server_default=text("1"))  # jobs that it runs at once
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
