"""Statistics against their definitions, by brute force, and what must hold of them whatever the values."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hmean

from worker.statistics import auc, entropy, harmonic_mean, interval, kolmogorov_smirnov, mean_interval

few = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)  # with ties
values = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)
fast = settings(max_examples=30, deadline=None)


@given(few, few)
def test_auc_counts_pairs(low: list[float], high: list[float]) -> None:
    pairs = [(one, other) for one in low for other in high]
    won = sum(Fraction(other > one) + Fraction(other == one, 2) for one, other in pairs)
    assert auc(low, high) == pytest.approx(float(won / len(pairs)), abs=1e-12)
    assert auc(low, high) + auc(high, low) == pytest.approx(1)


def test_auc_of_what_is_not_a_number_is_none() -> None:
    assert math.isnan(auc([1.0, math.nan], [2.0]))


def largest_distance(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(sum(v <= x for v in a) / len(a) - sum(v <= x for v in b) / len(b)) for x in (*a, *b))


@given(few, few)
def test_the_ks_statistic_is_the_largest_distance(a: list[float], b: list[float]) -> None:
    assert kolmogorov_smirnov(a, b).statistic == pytest.approx(largest_distance(a, b))


@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 4), (4, 3)])
def test_the_p_value_is_exact(n: int, m: int) -> None:
    """The share of the ways to deal out n + m values that puts the samples at least as far apart."""
    pooled = list(range(n + m))
    dealt = [[i for i in pooled if i not in chosen] for chosen in combinations(pooled, n)]
    apart = [largest_distance([i for i in pooled if i not in rest], rest) for rest in dealt]
    for rest, distance in zip(dealt, apart, strict=True):
        sample = [float(i) for i in pooled if i not in rest]
        expected = sum(other >= distance - 1e-12 for other in apart) / len(apart)
        assert kolmogorov_smirnov(sample, list(map(float, rest))).p_value == pytest.approx(expected)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9))
def test_the_harmonic_mean(numbers: list[float]) -> None:
    assert harmonic_mean(numbers) == pytest.approx(float(hmean(numbers)))
    assert harmonic_mean([*numbers, 0.0]) == 0.0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_entropy(counts: list[int]) -> None:
    shares = [count / sum(counts) for count in counts]
    assert entropy(counts) == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-9)
    assert entropy(counts) <= math.log(len(counts)) + 1e-9


@fast
@given(values, st.randoms(use_true_random=False))
def test_an_interval_has_the_mean_in_it_and_no_order(numbers: list[float], random: Any) -> None:
    found = mean_interval(numbers)
    assert found is not None
    low, high = found
    mean = float(np.mean(sorted(numbers)))
    assert min(numbers) - 1e-9 <= low <= mean <= high <= max(numbers) + 1e-9
    shuffled = list(numbers)
    random.shuffle(shuffled)
    assert mean_interval(shuffled) == found == mean_interval(numbers)


def test_an_interval_is_as_wide_as_theory_has_it() -> None:
    """1.96 standard errors to each side, of 400 rows; the percentiles of 1,000 draws are good to a few per cent."""
    rows = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = mean_interval(rows.tolist())
    assert found is not None
    error = rows.std() / math.sqrt(400)
    assert found == pytest.approx((rows.mean() - 1.96 * error, rows.mean() + 1.96 * error), abs=0.2 * error)


def test_the_columns_of_a_row_are_drawn_together() -> None:
    """Their ratio is 2 in every row, so it is 2 whatever is drawn; drawn apart it would vary."""
    rows = [(float(k), 2.0 * k) for k in range(1, 30)]
    assert interval([rows], lambda mean_K: mean_K[1] / mean_K[0]) == pytest.approx((2.0, 2.0))
    apart = interval([[(a,) for a, _ in rows], [(b,) for _, b in rows]], lambda mean_K: mean_K[1] / mean_K[0])
    assert apart is not None
    assert apart[1] - apart[0] > 0.3


@pytest.mark.parametrize("numbers", [[], [1.0], [1.0, math.inf], [1.0, math.nan]], ids=str)
def test_no_interval_where_there_is_none(numbers: list[float]) -> None:
    assert mean_interval(numbers) is None
