"""Statistics of rows: how two samples differ, and how far a figure would move on other rows like these."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import ks_2samp, norm, rankdata

RESAMPLES = 1_000
LEVELS = (2.5, 97.5)  # per cent
SEED = 0
DRAWN_AT_ONCE = 2**20  # rows

Array = NDArray[np.float64]


class KolmogorovSmirnov(NamedTuple):
    statistic: float  # the largest distance between the two distribution functions
    p_value: float  # two-sided, exact for samples of at most 10,000


def auc(low: Sequence[float], high: Sequence[float]) -> float:
    """How often a value of `high` is above one of `low`, ties counted half: the area under the ROC curve.

    By ranks (Mann and Whitney 1947). Both must have a value.

    >>> auc([1.0, 2.0], [2.0, 3.0])  # of four pairs three are above, one is a tie
    0.875
    """
    ranks = rankdata([*high, *low])
    n, m = len(high), len(low)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def auc_bounds(value: float, n: int, m: int, level: float) -> tuple[float, float]:
    """One-sided bounds of the AUC, each at the level; of samples of n and m values that were found to have this AUC.

    Method 5 of Newcombe 2006 (Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2, doi
    10.1002/sim.2324): the AUC from which the one found is as far as its own standard error allows, so that the bounds of 0 and 1
    are not 0 and 1 themselves.

    >>> [round(bound, 3) for bound in auc_bounds(0.5, 40, 40, 0.95)]
    [0.396, 0.604]
    >>> [round(bound, 3) for bound in auc_bounds(0.0, 10, 10, 0.95)]
    [0.0, 0.145]
    """
    z, near = float(norm.ppf(level)), 1e-9  # no error is left at 0 and 1 themselves

    def excess(at: float) -> float:
        extra = (n + m) / 2 - 1
        variance = at * (1 - at) * (1 + extra * ((1 - at) / (2 - at) + at / (1 + at))) / (n * m)
        return abs(value - at) - z * math.sqrt(variance)

    lower = 0.0 if value < near else float(brentq(excess, 0, min(value, 1 - near)))
    upper = 1.0 if value > 1 - near else float(brentq(excess, max(value, near), 1))
    return lower, upper


def kolmogorov_smirnov(a: Sequence[float], b: Sequence[float]) -> KolmogorovSmirnov:
    """Whether two samples, each with a value, come from one distribution.

    >>> kolmogorov_smirnov([1.0, 2.0], [3.0, 4.0])  # apart; so are 2 of the 6 ways to deal out four values
    KolmogorovSmirnov(statistic=1.0, p_value=0.3333333333333333)
    """
    found: Any = ks_2samp(np.asarray(a), np.asarray(b))
    return KolmogorovSmirnov(float(found.statistic), float(found.pvalue))


def harmonic_mean(values: Sequence[float]) -> float:
    """0 if one of the values, none of which is negative, is 0.

    >>> harmonic_mean([1.0, 0.5])
    0.6666666666666666
    """
    return 0.0 if 0.0 in values else len(values) / sum(1 / value for value in values)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean over rows. See `interval`."""
    return interval([[(value,) for value in values]], lambda mean_K: float(mean_K[0]))


def interval(groups: Sequence[Sequence[Sequence[float]]], of: Callable[[Array], float]) -> tuple[float, float] | None:
    """95 % interval of a function of means over rows, by percentile bootstrap (Efron and Tibshirani 1993).

    Args:
        groups: sets of rows, each drawn from by itself; a row has one value in each of its columns, which are drawn together.
        of: the means of all columns of all groups, in order, [K] -> the figure.

    The rows' order does not matter and the draws are always the same. None where a set has fewer than two rows, which say
    nothing of others like them, or where a value is not finite.
    """
    tables = [np.array(sorted(map(tuple, rows)), dtype=np.float64) for rows in groups]
    if any(len(table) < 2 or not np.isfinite(table).all() for table in tables):
        return None
    random = np.random.default_rng(SEED)
    means_RK = np.concatenate([_resampled(random, table) for table in tables], axis=1)
    drawn = np.array([of(mean_K) for mean_K in means_RK])
    whole = of(np.concatenate([table.mean(0) for table in tables]))
    low, high = np.percentile(drawn, LEVELS)
    return min(float(low), whole), max(float(high), whole)  # of equal values the means differ by rounding alone


def _resampled(random: np.random.Generator, rows_BK: Array) -> Array:
    """Means of rows drawn with replacement, [RESAMPLES, K]."""
    rows = len(rows_BK)
    at_once = max(1, DRAWN_AT_ONCE // rows)
    parts = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    return np.concatenate([rows_BK[random.integers(rows, size=(part, rows))].mean(1) for part in parts])


def entropy(counts: Sequence[int]) -> float:
    """Of the distribution that these counts are in proportion to, in nats.

    >>> entropy([2, 2]) == math.log(2)
    True
    """
    total = sum(counts)
    return math.log(total) - sum(count * math.log(count) for count in counts) / total
