"""Tails of sums against enumeration in fractions, direct convolution of positive numbers, mpmath and Gamma laws."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from assay.detection.convolution import log_sum_sf, log_weighted_count_sf, sum_tail, word_score_law
from assay.watermark.gumbel import sum_scores


def enumerated(values: Sequence[Sequence[float]], weights: Sequence[Sequence[int]], observed: float) -> Fraction:
    """P(sum >= observed) over all combinations, in fractions: floats are fractions, sums of them exact."""
    law: dict[Fraction, Fraction] = {Fraction(0): Fraction(1)}
    for row, shares in zip(values, weights, strict=True):
        step: dict[Fraction, Fraction] = defaultdict(Fraction)
        for (total, mass), (value, share) in itertools.product(law.items(), zip(row, shares, strict=True)):
            step[total + Fraction(value)] += mass * Fraction(share, sum(shares))
        law = step
    return sum((mass for total, mass in law.items() if total >= Fraction(observed)), Fraction(0))


def log_of(fraction: Fraction) -> float:
    with mpmath.workdps(30):
        return float(mpmath.log(mpmath.mpf(fraction.numerator) / fraction.denominator)) if fraction else -math.inf


def direct_law(weights: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """The law of sum a_t B_t for integers a_t >= 0, term by term: adding positive numbers only, it keeps digits."""
    law = np.zeros(int(weights.sum()) + 1)
    law[0] = 1.0
    for a, q in zip(weights, chances, strict=True):
        moved = np.zeros_like(law)
        moved[a:] = law[: len(law) - a]
        law = (1 - q) * law + q * moved
    return law


# Values of very different sizes, some equal, some integers; weights as integers make the probabilities exact.
VALUES = st.one_of(
    st.integers(-5, 5).map(float),
    st.floats(-10, 10, allow_subnormal=False),
    st.sampled_from([0.1, 0.2, 0.30000000000000004, 1e-7, 1e4]),
)
TERMS = st.lists(
    st.lists(st.tuples(VALUES, st.integers(1, 50)), min_size=1, max_size=3),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(terms=TERMS, choice=st.randoms(use_true_random=False), cells=st.sampled_from([16, 256, 2**12]))
def test_bracket_contains_the_exact_value(terms: list, choice: object, cells: int) -> None:
    values = [[value for value, _ in term] for term in terms]
    weights = [[share for _, share in term] for term in terms]
    probabilities = [np.array(row) / sum(row) for row in weights]
    # A sum that can occur, added in floats as a detector would: the atom itself must be counted.
    chosen = [choice.choice(row) for row in values]  # type: ignore[attr-defined]
    attained = sum((Fraction(value) for value in chosen), Fraction(0))
    for observed in (float(np.sum(chosen)), float(np.sum(chosen)) + 0.37):
        tail = sum_tail(values, probabilities, observed, cells=cells)
        at_most = log_of(enumerated(values, weights, observed))
        if observed == float(np.sum(chosen)):
            at_most = max(at_most, log_of(enumerated(values, weights, float(attained))))
        assert tail.log_upper >= at_most - 1e-13
        assert tail.log_lower <= log_of(enumerated(values, weights, observed)) + 1e-13


def test_integers_to_1e_minus_300_against_direct_convolution() -> None:
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 64, 400)
    chances = rng.uniform(0.02, 0.9, 400)
    above = np.cumsum(direct_law(weights, chances)[::-1])[::-1]
    mean = float(weights @ chances)
    for observed in np.linspace(0.9 * mean, weights.sum() * 0.995, 40).astype(int):
        if above[observed] > 1e-300:
            tail = sum_tail(np.stack([0 * weights, weights], 1), np.stack([1 - chances, chances], 1), observed)
            exact = math.log(above[observed])
            assert tail.log_lower <= exact + 1e-11
            assert exact - 1e-11 <= tail.log_upper <= exact + 1e-6
    assert above[int(weights.sum() * 0.97)] < 1e-80  # the grid above did go far out


def test_real_weights_to_1e_minus_100_against_direct_convolution() -> None:
    # Integers over 7: no lattice that is laid for the window contains them, and the exact law is still at hand.
    rng = np.random.default_rng(2)
    weights = rng.integers(1, 300, 300)
    chances = rng.uniform(0.05, 0.5, 300)
    above = np.cumsum(direct_law(weights, chances)[::-1])[::-1]
    for level in (0.5, 1e-3, 1e-10, 1e-50, 1e-100, 1e-180):
        observed = int(np.searchsorted(-above, -level))
        exact = math.log(above[observed])
        widths = []
        for cells in (2**12, 2**14, 2**16):
            rows = np.stack([np.zeros(300), weights / 7], 1)
            tail = sum_tail(rows, np.stack([1 - chances, chances], 1), observed / 7, cells=cells)
            assert tail.log_lower <= exact <= tail.log_upper
            assert tail.log_upper == log_weighted_count_sf(weights / 7, chances, observed / 7, cells=cells)
            widths.append(tail.log_upper - tail.log_lower)
        # A factor of 1.2 is stated; the bracket shrinks with the lattice.
        assert widths[2] < 0.2
        assert widths[2] < widths[1] < widths[0] or widths[0] < 0.01


def test_rounding_without_a_margin_is_rejected() -> None:
    # The near-miss: values rounded to the nearest point, the threshold left where it is. It must fall below the truth.
    rng = np.random.default_rng(3)
    weights, chances = rng.integers(1, 300, 100), rng.uniform(0.05, 0.5, 100)
    above = np.cumsum(direct_law(weights, chances)[::-1])[::-1]
    low_by_nearest = low_by_bound = 0
    for observed in range(3000, 8000, 500):
        nearest = np.rint(weights / 16).astype(int)
        rows = np.stack([0 * nearest, nearest], 1)
        p = np.stack([1 - chances, chances], 1)
        low_by_nearest += log_sum_sf(rows, p, observed / 16) < math.log(above[observed])
        low_by_bound += log_weighted_count_sf(weights / 7, chances, observed / 7, cells=1024) < math.log(
            above[observed]
        )
    assert low_by_nearest > 0
    assert low_by_bound == 0


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
@pytest.mark.parametrize("chance", [0.5, 0.01, 0.9])
def test_equal_coins_are_binomial(n: int, chance: float) -> None:
    for k in sorted({1, n // 3, n // 2, n - 1, n}):
        with mpmath.workdps(50):
            terms = [mpmath.mpf(k), mpmath.mpf(n - k + 1), 0, mpmath.mpf(chance)]
            exact = mpmath.betainc(*terms, regularized=True) if k > 0 else mpmath.mpf(1)
        tail = sum_tail([[0, 1]], [[1 - chance, chance]], k, counts=[n])
        assert tail.log_lower - 1e-12 <= float(mpmath.log(exact)) <= tail.log_upper + 1e-12
        assert tail.log_upper - tail.log_lower < 1e-6


def test_a_million_coins() -> None:
    tail = sum_tail([[0, 1]], [[0.5, 0.5]], 510_000, counts=[1_000_000])
    assert tail.log_upper == pytest.approx(stats.binom.logsf(509_999, 1_000_000, 0.5), rel=1e-7)
    assert tail.log_upper - tail.log_lower < 1e-6


@pytest.mark.parametrize("n", [1, 20, 1000])
def test_rounded_exponentials_lie_beside_the_gamma_law(n: int) -> None:
    # floor(Y / unit) <= Y / unit < floor + 1, so the lattice's tail lies between Gamma tails n levels apart.
    unit = 1 / 512
    levels, probabilities = word_score_law(sum_scores, unit)
    for mean in (0.9, 1.1, 2.0):
        observed = math.floor(n * mean / unit)
        tail = sum_tail(levels[None], probabilities[None], observed, counts=[n])
        assert tail.log_upper <= stats.gamma.logsf(observed * unit, n) + 1e-6
        assert tail.log_lower >= stats.gamma.logsf((observed + n) * unit, n) - 1e-6


def test_word_score_law_counts_words_exactly() -> None:
    def score(words: np.ndarray) -> np.ndarray:
        return np.select([words < 3, words < 1000, words < 2**31], [2.5, 1.0, 0.3], -0.5)

    levels, probabilities = word_score_law(score, 0.5)
    assert levels.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    counts = [2**31, 2**31 - 1000, 0, 997, 0, 0, 3]
    assert (probabilities * 2**32).tolist() == counts
    # -log((x + 1) / 2**32) reaches level k for x + 1 <= 2**32 exp(-k unit).
    levels, probabilities = word_score_law(sum_scores, 0.01)
    reached = np.cumsum(probabilities[::-1])[::-1]
    np.testing.assert_allclose(reached * 2**32, np.floor(2**32 * np.exp(-levels * 0.01)), atol=1)
    assert probabilities.sum() == 1.0


def test_a_thousand_different_terms_are_fast() -> None:
    rng = np.random.default_rng(4)
    weights, chances = rng.exponential(size=1000), rng.uniform(0.1, 0.6, 1000)
    observed = float(weights @ chances) + 20 * math.sqrt(float(weights**2 @ (chances * (1 - chances))))
    log_weighted_count_sf(weights, chances, observed)
    start = time.process_time()
    assert -240 < log_weighted_count_sf(weights, chances, observed) < -200
    # About 0.07 s on one slow core; the bound leaves room for a loaded machine.
    assert time.process_time() - start < 0.6


def test_a_long_sum_below_its_mean() -> None:
    # No tilt: the error of the transforms is bounded over the whole span.
    for k in (499_000, 500_000):
        tail = sum_tail([[0, 1]], [[0.5, 0.5]], k, counts=[1_000_000])
        exact = stats.binom.logsf(k - 1, 1_000_000, 0.5)
        assert tail.log_lower <= exact + 1e-9
        assert exact - 1e-9 <= tail.log_upper <= exact + 1e-6


def test_values_of_hopelessly_different_size() -> None:
    # The gap between 0 and 1e-198 asks for a tilt that no float can use: the bound is poor and still a bound.
    tail = sum_tail([[0.0, -1.0, 1e-198]], [[1 / 3] * 3], 1e-198)
    assert tail.log_lower <= math.log(1 / 3) <= tail.log_upper + 1e-12
    # Atoms many units of 1 / theta above the threshold.
    tail = sum_tail([[0.0, 1.0]], [[1.0, 1e-300]], 2.000001, counts=[5])
    exact = math.log(10) - 3 * 300 * math.log(10)
    assert tail.log_lower - 1e-9 <= exact <= tail.log_upper + 1e-9
    assert tail.log_upper - exact < 1e-6


def test_edges() -> None:
    assert log_sum_sf(np.empty((0, 2)), np.empty((0, 2)), 0.0) == 0.0
    assert log_sum_sf(np.empty((0, 2)), np.empty((0, 2)), 0.1) == -math.inf
    assert log_sum_sf([[1.0]], [[1.0]], 3.0, counts=[3]) == 0.0
    assert log_sum_sf([[0, 1]], [[0.5, 0.5]], 2) == -math.inf
    assert log_sum_sf([[0, 1]], [[0.5, 0.5]], -math.inf) == 0.0
    assert log_sum_sf([[0, 1]], [[0.5, 0.5]], math.inf) == -math.inf
    assert log_sum_sf([[0, 1]], [[0.5, 0.5]], 1, counts=[0]) == -math.inf
    # A value that cannot occur changes nothing.
    assert log_sum_sf([[0, 1, 1e9]], [[0.5, 0.5, 0]], 2, counts=[4]) == log_sum_sf(
        [[0, 1]], [[0.5, 0.5]], 2, counts=[4]
    )
    assert log_weighted_count_sf([-1.0, 2.0], [0.0, 1.0], 2.0) == 0.0
    assert log_weighted_count_sf([], 0.5, 0.0) == 0.0
    assert (log_sum_sf([], [], 0), log_sum_sf([], [], 1)) == (0.0, -math.inf)
    assert log_sum_sf([[0, 1e100]], [[0.5, 0.5]], 2e100, counts=[2]) == pytest.approx(2 * math.log(0.5), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "probabilities", "options", "message"),
    [
        ([[0, 1]], [[0.5, 0.6]], {}, "sum to 1"),
        ([[0, 1]], [[1.5, -0.5]], {}, "at least 0"),
        ([[0, math.nan]], [[0.5, 0.5]], {}, "values must be finite"),
        ([[0, 1e300]], [[0.5, 0.5]], {}, "at most 1e\\+100"),
        ([[0, 1]], [[0.5, math.nan]], {}, "probabilities must be"),
        ([[0, 1]], [[1.0]], {}, "same shape"),
        ([0, 1], [0.5, 0.5], {}, "one sequence for each term"),
        ([[]], [[]], {}, "k at least 1"),
        ([[0, 1]], [[0.5, 0.5]], {"counts": [1, 2]}, "counts must be"),
        ([[0, 1]], [[0.5, 0.5]], {"counts": [0.5]}, "counts must be"),
        ([[0, 1]], [[0.5, 0.5]], {"cells": 8}, "cells must be at least 16"),
    ],
)
def test_bad_input(values: list, probabilities: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_sum_sf(values, probabilities, 1.0, **options)


def test_bad_input_of_the_others() -> None:
    with pytest.raises(ValueError, match="observed must be a number"):
        log_sum_sf([[0, 1]], [[0.5, 0.5]], math.nan)
    with pytest.raises(ValueError, match=r"chances must be in \[0, 1\]"):
        log_weighted_count_sf([1.0], [1.5], 1.0)
    with pytest.raises(ValueError, match=r"weights must have shape \(n,\)"):
        log_weighted_count_sf([1.0, 2.0], [0.5], 1.0)
    with pytest.raises(ValueError, match="unit must be greater than 0"):
        word_score_law(sum_scores, 0.0)
    with pytest.raises(ValueError, match="not increase with the word"):
        word_score_law(lambda words: words.astype(np.float64), 1.0)
