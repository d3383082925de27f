"""Stored figures of a model, as the field's reference prints them: figure -> `agg_value`, and `value_by_index` by row."""

import json
import math
from typing import Any

from service.domain.errors import FieldProblem, InvalidRequest

BYTES_MAX = 16 * 2**20  # those of all of TOFU, with the generations, take 1 MiB
PROBLEMS_MAX = 20
NAME_MAX = 80  # characters of a figure's name that a problem quotes
PARTS = ("forget", "holdout")  # of a comparison of two sets


def read(content: bytes, pointer: str = "") -> dict[str, Any]:
    """The figures. Raises InvalidRequest, naming those that have no `agg_value` that is a number or null (at most 20)."""
    if len(content) > BYTES_MAX:
        raise InvalidRequest(FieldProblem(pointer, f"figures take at most {BYTES_MAX} bytes", "size"))
    try:
        figures = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidRequest(FieldProblem(pointer, "not one JSON document in UTF-8", "json")) from None
    if not isinstance(figures, dict) or not figures:
        raise InvalidRequest(FieldProblem(pointer, "not a JSON object of figures", "type"))
    wrong = [name for name, figure in figures.items() if not _is_figure(figure)]
    if wrong:
        detail = "is no figure: agg_value, a finite number or null, and value_by_index, an object for each row's number"
        raise InvalidRequest(
            *(FieldProblem(pointer, f"{name[:NAME_MAX]!r} {detail}", "type") for name in wrong[:PROBLEMS_MAX])
        )
    return figures


def _is_figure(figure: Any) -> bool:
    if not isinstance(figure, dict) or "agg_value" not in figure or not _is_number(figure["agg_value"]):
        return False
    rows, interval = figure.get("value_by_index", {}), figure.get("interval_95")
    return (
        isinstance(rows, dict)
        and all(
            place.isdecimal() and isinstance(row, dict) and _is_number(row.get("score")) for place, row in rows.items()
        )
        and (interval is None or (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))))
        and all(_is_figure(figure[part]) for part in PARTS if part in figure)
    )


def _is_number(value: Any) -> bool:
    """Or null."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
