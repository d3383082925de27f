"""How likely the forgotten answers may still be: on average, and row by row.

A tenth of what it was is forgotten, but who was never taught a row does not find every statement of its form a tenth as likely
either. So a limit has a floor: what is given to wrong answers of the same wording (`perturbed_answer`), by the model before or by
the model after, whichever is more, else what a retrained reference gives to the right one. It never exceeds half of what the row
had, so that a model that was left as it is breaks every limit.

A row of whose wrong answers the model before found one likelier than the right one was not known to it as that row: it is trained
and counts in the mean, but has no limit of its own.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

SHARE = 0.1  # of the probability before
FLOOR_MAX = 0.5  # of the same
LIKELIER = 1.001  # times: more than the sums of one text differ by between batches
ROWS_SHARE = 0.05  # of the rows may be above their limits, and one may in any case
LEVEL = 0.95
RESAMPLES = 2_000
TINY = 1e-30

WRONG = "what wrong answers of the same wording are given"
RETRAINED = "what the retrained reference gives to them"

Wrong = Mapping[int, Sequence[float]]  # place -> probabilities of the row's wrong answers


class Limits(NamedTuple):
    """What the rows' probabilities are held against. They are length-normalised: exp of the mean log p per token."""

    before: float  # mean over rows
    mean: float  # the mean over rows is at most this
    source: str | None  # where the floor comes from, if it is what decides `mean`
    against: str  # where there is one, what the floor is
    rows: Mapping[int, float]  # place -> at most this; of those that were known
    rows_allowed: int  # above their own limits
    unknown: list[int]  # places without a limit of their own

    def rows_allowed_of(self, rows: int) -> int:
        """The same, of so many rows that a check measures."""
        return max(1, math.floor(self.rows_allowed * rows / (len(self.rows) + len(self.unknown))))

    def above(self, after: Mapping[int, float]) -> list[int]:
        """Places whose probability is above their limit, or no number."""
        return [place for place, limit in sorted(self.rows.items()) if place in after and not after[place] <= limit]


def limits(before: Mapping[int, float], wrong: Sequence[Wrong] = (), retrained: Mapping[int, float] = {}) -> Limits:
    """By the rows' probabilities before, those of their wrong answers under each model, and those under a retrained reference.

    Right answers that are no likelier than wrong ones are as likely on average, not less: so the floor is what the mean over rows
    of a wrong answer drawn for each seldom exceeds, with a chance of one in twenty.

    Args:
        wrong: under the model before, then under the one after.

    >>> limits({0: 0.9, 1: 0.5}).mean, limits({0: 0.9}).rows
    (0.06999999999999999, {0: 0.09000000000000001})
    >>> floored = limits({0: 0.9, 1: 0.5}, [{0: [0.2], 1: [0.3]}])
    >>> floored.mean, floored.rows
    (0.225, {0: 0.2, 1: 0.25})
    >>> limits({0: 0.9, 1: 0.01}, [{0: [0.9, 0.2], 1: [0.02]}]).unknown  # the first one's right answer is among the wrong
    [1]
    """
    given = {
        place: [[min(value, FLOOR_MAX * was) for value in of[place]] for of in wrong if of.get(place)]
        or ([[min(retrained[place], FLOOR_MAX * was)]] if place in retrained else [])
        for place, was in before.items()
    }
    largest = {place: max((max(of) for of in several), default=0.0) for place, several in given.items()}
    mean_before = fmean(before.values())
    floor = max((_drawn([of[k] for of in given.values() if k < len(of)], len(before)) for k in range(2)), default=0.0)
    unknown = [
        place for place, was in before.items() if wrong and any(one > LIKELIER * was for one in wrong[0].get(place, ()))
    ]
    judged = {place: was for place, was in before.items() if place not in unknown}
    floored = [place for place, was in judged.items() if largest[place] > SHARE * was]
    against = WRONG if any(wrong) else RETRAINED
    return Limits(
        before=mean_before,
        mean=max(SHARE * mean_before, floor),
        source=against if floor > SHARE * mean_before else None,
        against=against,
        rows={place: max(SHARE * was, largest[place]) for place, was in judged.items()},
        rows_allowed=_allowed(
            len(judged), [len(given[place][-1]) for place in floored if any(place in of for of in wrong)]
        ),
        unknown=unknown,
    )


def _drawn(alternatives: Sequence[Sequence[float]], rows: int) -> float:
    """The mean over rows of one of each row's alternatives, drawn: the upper end of what it may be. Rows without any count 0."""
    if not alternatives:
        return 0.0
    random = np.random.default_rng(0)
    sums_R = sum(np.asarray(of)[random.integers(len(of), size=RESAMPLES)] for of in alternatives)
    return float(np.quantile(sums_R, LEVEL)) / rows


def ratio(
    after: Mapping[int, float], wrong: Mapping[int, Sequence[float]], retrained: Mapping[int, float]
) -> tuple[float, float] | None:
    """How the right answers stand against the floor: the geometric mean over rows, and its one-sided 95 % upper bound.

    None where there is no floor.

    >>> [round(value, 6) for value in ratio({0: 0.02, 1: 0.02}, {0: [0.2], 1: [0.2]}, {})]
    [0.1, 0.1]
    """
    logs = [
        math.log(max(value, TINY)) - fmean(math.log(max(one, TINY)) for one in given)
        for place, value in sorted(after.items())
        if (given := wrong.get(place) or ([retrained[place]] if place in retrained else []))
    ]
    if not logs:
        return None
    drawn = np.random.default_rng(0).choice(logs, (RESAMPLES, len(logs))).mean(1)
    return math.exp(fmean(logs)), math.exp(float(np.quantile(drawn, LEVEL)))


def _allowed(rows: int, alternatives: Sequence[int]) -> int:
    """One in twenty rows; of those that are held against their wrong answers as many as rank above all of these by chance."""
    chance = [1 / (count + 1) for count in alternatives if count]
    by_chance = int(binom.ppf(LEVEL, len(chance), fmean(chance))) if chance else 0
    return max(1, math.floor(ROWS_SHARE * rows), by_chance)
