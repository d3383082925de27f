"""Stored figures of a model, as the field's reference prints them: figure -> `agg_value`, and `value_by_index` by row."""

import json
from typing import Any

from service.domain.errors import FieldProblem, InvalidRequest

BYTES_MAX = 16 * 2**20  # those of all of TOFU, with the generations, take 1 MiB
PROBLEMS_MAX = 20


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
        detail = "has no agg_value that is a number or null, or a value_by_index that is no object"
        raise InvalidRequest(*(FieldProblem(pointer, f"{name!r} {detail}", "type") for name in wrong[:PROBLEMS_MAX]))
    return figures


def _is_figure(figure: Any) -> bool:
    if not isinstance(figure, dict) or "agg_value" not in figure:
        return False
    value = figure["agg_value"]
    a_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (value is None or a_number) and isinstance(figure.get("value_by_index", {}), dict)
