"""Keyset pages: the cursor is an id, so a page costs the same wherever it lies and shifts under no insert."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

Order = Literal["asc", "desc"]
T = TypeVar("T")


def fetch_page(
    s: Session,
    rows: Select[T],
    column: InstrumentedAttribute[Any],
    *,
    after: str | None,
    before: str | None,
    limit: int,
    order: Order,
) -> tuple[Sequence[T], bool]:
    """The rows following `after`, or those preceding `before`, in `order`; and whether more lie in that direction."""
    backwards = after is None and before is not None
    ascending = (order == "asc") is not backwards
    if after is not None:
        rows = rows.where(column > after if order == "asc" else column < after)
    if before is not None:
        rows = rows.where(column < before if order == "asc" else column > before)
    found = s.scalars(rows.order_by(column.asc() if ascending else column.desc()).limit(limit + 1)).all()
    page = found[:limit]
    return (page[::-1] if backwards else page), len(found) > limit
