"""Stored figures of a model, as the field's reference prints them: figure -> `agg_value`, and `value_by_index` by row.

`unlearn evaluate` prints a digest of each set's rows beside them; the reference prints the answers that its ROUGE compares with.
By either, figures of other rows are found, though they be as many.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from service.domain.errors import FieldProblem, InvalidRequest
from service.domain.rows import COLUMNS

BYTES_MAX = 16 * 2**20  # those of all of TOFU, with the generations, take 1 MiB
PROBLEMS_MAX = 20
NAME_MAX = 80  # characters of a figure's name that a problem quotes
PARTS = ("forget", "holdout")  # of a comparison of two sets
DIGESTS = "rows_sha256"  # beside the figures: set -> `digest` of its rows
SHA256 = re.compile("[0-9a-f]{64}")
ANSWERED = {  # the figures that have answers of a set, row by row
    "forget_Q_A_ROUGE": "forget",
    "retain_Q_A_ROUGE": "retain",
    "ra_Q_A_ROUGE": "real_authors",
    "wf_Q_A_ROUGE": "world_facts",
    "forget_knowmem_ROUGE": "forget_knowmem",
    "retain_knowmem_ROUGE": "retain_knowmem",
    "forget_verbmem_ROUGE": "verbmem",
}
EVERY_ROW = "mia_min_k"  # has a value for each row of both its sets, also for one without a token that counts


class Stored(NamedTuple):
    figures: dict[str, Any]
    digests: dict[str, str]  # of the sets' rows; empty: not of `unlearn evaluate`


def read(content: bytes, pointer: str = "") -> Stored:
    """Raises InvalidRequest, naming the figures that have no `agg_value` that is a number or null (at most 20)."""
    if len(content) > BYTES_MAX:
        raise InvalidRequest(FieldProblem(pointer, f"figures take at most {BYTES_MAX} bytes", "size"))
    try:
        figures = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidRequest(FieldProblem(pointer, "not one JSON document in UTF-8", "json")) from None
    if not isinstance(figures, dict) or not figures:
        raise InvalidRequest(FieldProblem(pointer, "not a JSON object of figures", "type"))
    digests = figures.pop(DIGESTS, {})
    if not isinstance(digests, dict) or not all(isinstance(d, str) and SHA256.fullmatch(d) for d in digests.values()):
        detail = f"{DIGESTS!r} is not an object of SHA-256 digests in hexadecimal digits"
        raise InvalidRequest(FieldProblem(pointer, detail, "type"))
    wrong = [name for name, figure in figures.items() if not _is_figure(figure)]
    if wrong:
        detail = "is no figure: agg_value, a finite number or null, and value_by_index, an object for each row's number"
        raise InvalidRequest(
            *(FieldProblem(pointer, f"{name[:NAME_MAX]!r} {detail}", "type") for name in wrong[:PROBLEMS_MAX])
        )
    return Stored(figures, digests)


# --- whose rows they are of


def digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of a set's rows in their order: of the columns with a meaning, however the file writes them."""
    said = hashlib.sha256()
    for row in rows:
        meant = {name: row[name] for name in COLUMNS if name in row}
        said.update(json.dumps(meant, sort_keys=True).encode() + b"\n")
    return said.hexdigest()


def mismatch(stored: Stored, name: str, rows: Iterable[Mapping[str, Any]]) -> str | None:
    """What shows that the figures are of other rows than the set of that name has; None: nothing does."""
    given = list(rows)
    if name in stored.digests:
        same = stored.digests[name] == digest(given)
        return (
            None
            if same
            else f"the figures are of other rows than the set {name!r}, by the digest that they have of them"
        )
    part = (stored.figures.get(EVERY_ROW) or {}).get(name) or {}
    count = len(part.get("value_by_index") or given)
    if count != len(given):
        return f"the figures are of {count} rows, and the set {name!r} has {len(given)}"
    for place, answer in _answers(stored, name).items():
        if place >= len(given):
            return f"the figures are of more rows than the {len(given)} of the set {name!r}"
        if not _is_of(answer, given[place]):
            return f"the figures are of other rows than the set {name!r}: the answer of row {place + 1} is another one there"
    return None


def untied(stored: Stored, names: Iterable[str]) -> list[str]:
    """Those of the sets of which the figures say nothing that their rows could be known by."""
    return [name for name in names if name not in stored.digests and not _answers(stored, name)]


def _answers(stored: Stored, name: str) -> dict[int, str]:
    """Place of the row, from 0 -> its answer as the tokeniser gives it back, which may lack characters and be cut."""
    found = (
        stored.figures.get(figure, {}).get("value_by_index") or {} for figure, of in ANSWERED.items() if of == name
    )
    return {
        int(place): _folded(row["ground_truth"])
        for by_row in found
        for place, row in by_row.items()
        if isinstance(row.get("ground_truth"), str)
    }


def _is_of(answer: str, row: Mapping[str, Any]) -> bool:
    """Whether the row's own answer has all these letters and digits, in their order."""
    rest = iter(_folded(row.get("gt") or row.get("answer") or ""))
    return all(character in rest for character in answer)


def _folded(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


# --- their form


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
