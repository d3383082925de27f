"""What one scoring pass says of each row, and what a metric makes of it."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Of the rows named in `places`. None: that view was not asked for."""

    places: list[int]  # 0-based, of the rows that were measured
    nll_B: Tensor  # float64, summed over the row's counted tokens, end of sequence included
    counted_B: Tensor  # int64
    hits: list[Tensor] | None = None  # bool per row: the most likely token is the label; end of sequence left out
    generated: Mapping[int, str] | None = None  # place -> greedy answer
    answers: Mapping[int, str] | None = None  # place -> the answer that it is compared with


class Score(NamedTuple):
    """The mean over rows, with the rows. `value` is None, with a reason, where nothing could be measured."""

    value: float | None
    by_row: dict[int, float]  # place -> value
    reason: str | None = None


class Metric(NamedTuple):
    fn: Callable[[Scores], Score]
    needs: frozenset[str]  # of {"hits", "generated"}
    better: Mapping[str, Literal["lower", "higher"]]  # set -> which way unlearning wants it
    definition: str


def mean(by_row: dict[int, float], empty: str = "no row could be measured") -> Score:
    """The mean over rows, or `empty` as the reason why there is none.

    >>> mean({0: 0.5, 2: 1.0}).value
    0.75
    >>> mean({}).reason
    'no row could be measured'
    """
    if not by_row:
        return Score(None, {}, empty)
    return Score(sum(by_row.values()) / len(by_row), by_row)


FORGOTTEN_LOWER: Mapping[str, Literal["lower", "higher"]] = {"forget": "lower", "retain": "higher"}
