"""What one scoring pass says of each row, and what a metric makes of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Of the rows named in `places`. None: that view was not asked for.

    Per token: of the row's counted tokens, a final end of sequence left out.
    """

    places: list[int]  # 0-based, of the rows that were measured
    nll_B: Tensor  # float64, summed over the row's counted tokens, end of sequence included
    counted_B: Tensor  # int64
    hits: list[Tensor] | None = None  # bool per token: the most likely token is the label
    generated: Mapping[int, str] | None = None  # place -> greedy answer
    answers: Mapping[int, str] | None = None  # place -> the answer that it is compared with
    logp: list[Tensor] | None = None  # per token, nats
    standardised: list[Tensor] | None = None  # per token: (log p - its mean) / its deviation under the model
    gradient_norm_B: Tensor | None = None  # float64: mean over parameter tensors of the 2-norm of d mean log p
    labels: Mapping[int, str] | None = None  # place -> the counted tokens as text, special tokens left out
    generated_ids: Mapping[int, list[int]] | None = None  # place -> the tokens of the greedy answer
    empty: Sequence[int] = ()  # 0-based places of the rows without a counted token
    prompts: Mapping[int, str] | None = None  # place -> what it answers, as the model reads it, special tokens left out


class Score(NamedTuple):
    """The mean over rows, with the rows. `value` is None, with a reason, where nothing could be measured."""

    value: float | None
    by_row: dict[int, float]  # place -> value
    reason: str | None = None


class Metric(NamedTuple):
    fn: Callable[[Scores], Score]
    needs: frozenset[str]  # views of Scores: "hits", "logp", "standardised", "gradient_norm", "labels", "generated"
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
    return Score(math.fsum(by_row.values()) / len(by_row), by_row)  # whatever the order


def mean_loss(scores: Scores) -> dict[int, float]:
    """Place -> loss per counted token of the row, end of sequence included, in nats."""
    return dict(zip(scores.places, (scores.nll_B / scores.counted_B).tolist(), strict=True))


def lowest_mean(value_N: Tensor, share: float) -> float:
    """The mean of that share of a row's values which is lowest, at least one of them. [N], N > 0.

    >>> import torch
    >>> lowest_mean(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), 0.7)  # 3.5 of them, rounded down
    2.0
    """
    lowest = value_N.double().topk(max(1, int(len(value_N) * share)), largest=False)
    return float(lowest.values.mean())


def runs(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens.

    >>> runs([1, 2, 3], 2)
    [(1, 2), (2, 3)]
    """
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


NOTHING_SAID = "no greedy answer is long enough"
FORGOTTEN_LOWER: Mapping[str, Literal["lower", "higher"]] = {"forget": "lower", "retain": "higher"}
