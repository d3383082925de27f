"""JSON in the one form in which it is hashed and signed (RFC 8785), and the strict way back."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, NoReturn

import rfc8785
from pydantic import BaseModel, ConfigDict, Field

SAFE = 2**53 - 1  # beyond it not every integer is a double, and RFC 8785 knows doubles alone

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^(sha256|hmac-sha256):[0-9a-f]{64}$")]
Instant = Annotated[  # RFC 3339, UTC
    str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z$")
]


class Strict(BaseModel):
    """What is hashed or signed: a field too many, a number as a string or one that is not finite is an error."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        hide_input_in_errors=True,  # errors are logged, and what was put in is nobody's business there
    )


def dumps(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value, or of a model by its aliases.

    A number is the double that it is: 1.0 and 1 are the same, and so are 1e20 and the integer as which a database gives it back.
    Raises ValueError for what has no such form: NaN, an integer that no double is written as, a lone surrogate, a key that
    is no string.

    >>> dumps({"b": 1.0, "a": [10**20, "\u20ac", None]}).decode()
    '{"a":[100000000000000000000,"€",null],"b":1}'
    """
    try:
        return rfc8785.dumps(_doubles(value.model_dump(by_alias=True) if isinstance(value, BaseModel) else value))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def loads(data: bytes) -> Any:
    """The value of JSON in UTF-8. Raises ValueError where readers could disagree on it: a key twice, NaN, no UTF-8."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refused)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def instant(moment: datetime) -> str:
    """RFC 3339 in UTC, always with six digits, so that a moment has one form.

    >>> instant(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    '2026-01-02T03:04:05.000000Z'
    """
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _doubles(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _doubles(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_doubles(inner) for inner in value]
    if isinstance(value, int) and abs(value) > SAFE:
        return _written_as(value)
    return value


def _written_as(value: int) -> int | float:
    """The double whose shortest decimal these digits are, if one is: as Python reads what this module, or jsonb, wrote of it."""
    try:
        double = float(value)
    except OverflowError:
        return value
    return double if Decimal(repr(double)) == value else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
