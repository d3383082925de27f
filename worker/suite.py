"""What an evaluation suite is: which texts it wants looked at, and what it makes of what was seen.

Both halves are pure, so that a suite is tested on numbers from anywhere, and every text is looked at once for all figures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from service.domain.rows import FORMS, Example
from worker.scores import Scores

Row = Mapping[str, Any]  # of a set: its columns
Sets = Mapping[str, Sequence[Row]]  # by name; a set that was not given is not there
Key = tuple[str, str]  # (set, text): ("forget", "answer"), ("forget", "perturbed_answer.0")
Better = Literal["lower", "higher"] | None


class SetForm(NamedTuple):
    """A set that a suite takes."""

    what: str  # one sentence
    columns: frozenset[str]  # that every row must have
    optional: frozenset[str] = frozenset()  # what else it makes use of
    required: bool = True


class Convention(NamedTuple):
    """How a benchmark's reference code makes tokens of a text, which is not how a model is served.

    See worker.data.encode_as_benchmark.
    """

    shots: Sequence[tuple[str, str]] = ()  # questions and answers that stand before each question
    ends: bool = True  # with the end of sequence; False: as text of a corpus


class Ask(NamedTuple):
    """Texts of one kind, and which views of them a suite needs."""

    texts: Mapping[int, Example]  # by place of the row, 0-based; never empty
    views: frozenset[str]  # of worker.scores.Scores, beside the NLL: "hits", "logp", ..., "generated"
    max_new_tokens: int = 200
    stops: tuple[str, ...] = ()  # an answer ends before the first of them
    scored: bool = True  # False: only generated
    answer_tokens_max: int | None = None  # what is scored is cut to so many
    beyond_context: bool = False  # answers go on past the model's context, where it has positions there
    convention: Convention | None = None  # of a benchmark; None: as the model is served


Asks = Mapping[Key, Ask]
Seen = Mapping[Key, Scores]


class Result(NamedTuple):
    """One figure. `value` is None, with the reason, where it could not be measured."""

    value: float | None
    by_row: Mapping[int, Any] = {}  # place -> value, or the fields that the reference prints
    reason: str | None = None
    interval: tuple[float, float] | None = None  # 95 %, by bootstrap over rows
    rows: int = 0  # over which it was taken
    parts: Mapping[str, "Result"] = {}  # of a comparison of two sets: "forget" and "holdout"


class FigureForm(NamedTuple):
    """A figure that a suite can give."""

    definition: str
    better: Better = None  # which way unlearning wants it; None: neither
    benchmark: bool = True  # computed as the reference does, under its name; False: ours, beside it
    retrained: bool = False  # needs a retrained reference


class Suite(NamedTuple):
    sets: Mapping[str, SetForm]
    figures: Mapping[str, FigureForm]
    asks: Callable[[Sets], Asks]
    # (what was seen, the figures of the retrained reference) -> one result for each name in `figures`
    results: Callable[[Sets, Seen, Mapping[str, Result] | None], dict[str, Result]]


def example(row: Row, answer: str | None = None) -> Example:
    """The row as a text, or with another answer than its own: a question, a literal prompt, or a text that has none."""
    kind = next(kind for kind, fields in FORMS.items() if all(field in row for field in fields))
    prompt, own = row[FORMS[kind][0]], row[FORMS[kind][-1]]
    return Example(kind, "" if kind == "text" else prompt, own if answer is None else answer)  # type: ignore[arg-type]


def examples(rows: Sequence[Row], column: str | None = None) -> dict[int, Example]:
    """By place: the rows or, with a column, those that have it, with what it says as their answer."""
    if column is None:
        return {place: example(row) for place, row in enumerate(rows)}
    return {place: example(row, row[column]) for place, row in enumerate(rows) if column in row}


def alternatives(rows: Sequence[Row], column: str) -> list[dict[int, Example]]:
    """The same of a column that holds lists: the first of each row that has one, the second, and so on."""
    lists = {place: row[column] for place, row in enumerate(rows) if column in row}
    return [
        {place: example(rows[place], texts[k]) for place, texts in lists.items() if k < len(texts)}
        for k in range(max(map(len, lists.values()), default=0))
    ]


def for_retrained(suite: Suite) -> Suite:
    """The suite as a retrained reference is run through it: only what others are compared with, and nothing generated."""

    def asks(sets: Sets) -> Asks:
        asked = {key: ask for key, ask in suite.asks(sets).items() if key[0] in ("forget", "holdout") and ask.scored}
        return {key: ask._replace(views=ask.views - {"generated"}) for key, ask in asked.items()}

    return suite._replace(asks=asks)


# --- in the shape of the field's reference: figure -> agg_value, value_by_index


def to_reference_json(results: Mapping[str, Result]) -> dict[str, Any]:
    """As the reference prints it, with `interval_95` and `reason` beside where there is one."""
    return {name: _printed(result) for name, result in results.items()}


def _printed(result: Result) -> dict[str, Any]:
    printed: dict[str, Any] = {name: _printed(part) for name, part in result.parts.items()}
    if result.parts:
        printed["auc"] = _finite(result.value)
    printed["agg_value"] = _finite(result.value)
    if result.by_row:
        printed["value_by_index"] = {str(place): _finite(value) for place, value in result.by_row.items()}
    if result.interval is not None:
        printed["interval_95"] = list(result.interval)
    if result.reason is not None:
        printed["reason"] = result.reason
    return printed


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_reference_json(figures: Mapping[str, Any]) -> dict[str, Result]:
    """What this or the reference has printed; what is no figure (a timing, a setting) is passed over."""
    return {name: _read(f) for name, f in figures.items() if isinstance(f, dict) and "agg_value" in f}


def _read(printed: Mapping[str, Any]) -> Result:
    by_row = {int(place): value for place, value in (printed.get("value_by_index") or {}).items()}
    interval = printed.get("interval_95")
    return Result(
        printed["agg_value"],
        by_row,
        printed.get("reason"),
        None if interval is None else (interval[0], interval[1]),
        len(by_row),
        {name: _read(printed[name]) for name in ("forget", "holdout") if isinstance(printed.get(name), dict)},
    )
