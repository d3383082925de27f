"""What tables share. Status and other closed sets are text with a CHECK; times are the database's; JSON is jsonb."""

import math
from collections.abc import Iterable
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import ForeignKey, MetaData, Text
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, JSONB, TIMESTAMP
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import BigInteger, TypeDecorator

from service.domain.job import Status

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


class Owned:
    """A row of one tenant: a session that is bound to another does not see it (see tenancy.py)."""

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))


def one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in sorted(values))})"
