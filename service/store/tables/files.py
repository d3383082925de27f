"""Uploaded sets and stored figures: the bytes lie encrypted below the storage root."""

from datetime import datetime
from typing import get_args

from sqlalchemy import CheckConstraint, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from service.domain.job import FilePurpose
from service.store.tables.base import Base, Owned, one_of


class File(Owned, Base):
    """An uploaded set. Once it is purged its key and its plain digest are gone; counts and the keyed digest stay."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    purpose: Mapped[str]
    key: Mapped[str]  # below the storage root
    bytes: Mapped[int]
    digest: Mapped[str]  # keyed: HMAC-SHA-256 of the content, "hmac-sha256:" and 64 hex digits
    rows: Mapped[int]
    created_by: Mapped[str]
    sealed: Mapped[str | None]  # encrypted: the key of the bytes, their plain digest, the file's name; null once purged
    purge_at: Mapped[datetime | None]  # as soon as nobody needs it after that
    purged_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(one_of("purpose", get_args(FilePurpose)), name="purpose"),
        CheckConstraint("(purged_at IS NULL) = (sealed IS NOT NULL)", name="purged"),
        Index("files_tenant_id_id_idx", "tenant_id", "id"),
        Index("files_purge_at_idx", "purge_at", postgresql_where=text("purged_at IS NULL AND purge_at IS NOT NULL")),
    )
