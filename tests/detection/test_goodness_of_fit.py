"""Exact crossing probabilities against integrals in fractions, Smirnov's law and a positive recursion; size."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from assay.detection.goodness_of_fit import (
    berk_jones_test,
    divergence,
    divergence_test,
    log_calibrated,
    log_crossing_probability,
)
from assay.detection.gumbel import sum_test
from assay.watermark.gumbel import Pivots, pivots
from assay.watermark.keys import SecretKey

MakeKey = Callable[..., SecretKey]


def seen(r: np.ndarray) -> Pivots:
    """Pivots whose words are the cells of r."""
    words = np.minimum(np.floor(r * 2.0**32), 2.0**32 - 1).astype(np.uint32)
    return Pivots(np.arange(len(r)), words, len(r), 0)


def crossing_by_integrals(bounds: list[Fraction]) -> Fraction:
    """1 - n! vol(b_i < u_1 < ... < u_n < 1) by integrating polynomials in fractions; bounds must not decrease."""
    polynomial = [Fraction(1)]  # in t, lowest degree first
    for bound in bounds:
        integral = [Fraction(0), *(c / (k + 1) for k, c in enumerate(polynomial))]
        integral[0] = -sum(c * bound**k for k, c in enumerate(integral))
        polynomial = integral
    return 1 - math.factorial(len(bounds)) * sum(polynomial)


def crossing_by_steps(bounds: np.ndarray) -> float:
    """The same, following the number of points from bound to bound: positive terms only, O(n^3)."""
    n = len(bounds)
    law = np.zeros(n + 1)
    law[0] = 1.0
    before, crossed = 0.0, 0.0
    for i, bound in enumerate(np.maximum.accumulate(bounds), 1):
        moved = np.zeros(n + 1)
        chance = (bound - before) / (1 - before)
        for m in range(i):
            moved[m:] += law[m] * stats.binom.pmf(np.arange(n - m + 1), n - m, chance)
        crossed += float(moved[i:].sum())
        moved[i:] = 0.0
        law, before = moved, float(bound)
    return crossed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_crossing_probability_against_integrals(thousandths: list[int]) -> None:
    bounds = sorted(Fraction(k, 1000) for k in thousandths)
    exact = float(crossing_by_integrals(bounds))
    with np.errstate(divide="ignore"):
        value = log_crossing_probability(np.log([float(b) for b in bounds]))
    assert math.exp(value) == pytest.approx(exact, rel=1e-7, abs=1e-300)
    assert math.exp(value) >= exact * (1 - 1e-15)


@pytest.mark.parametrize("n", [1, 10, 300, 2000])
def test_linear_bounds_are_smirnovs_law(n: int) -> None:
    # U_(i) <= i/n - d for some i: the one-sided Kolmogorov-Smirnov statistic is at least d.
    for z in (0.3, 1.0, 2.0, 5.0, 12.0):
        d = z / math.sqrt(n)
        if d < 1:
            with np.errstate(divide="ignore"):
                bounds = np.log(np.maximum(np.arange(1, n + 1) / n - d, 0.0))
            assert log_crossing_probability(bounds) == pytest.approx(stats.ksone.logsf(d, n), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("level", [0.7, 0.05, 1e-6, 1e-60])
def test_binomial_bounds_against_positive_recursion(level: float) -> None:
    i = np.arange(1, 101)
    bounds = special.betaincinv(i, 101 - i, level)
    assert math.exp(log_crossing_probability(np.log(bounds))) == pytest.approx(crossing_by_steps(bounds), rel=1e-7)


def test_bounds_that_hug_the_diagonal_or_jump() -> None:
    rng = np.random.default_rng(1)
    for scale in (0.3, 0.9, 0.99):
        bounds = np.sort(rng.random(60)) * scale
        bounds[10:30] = bounds[10]
        assert math.exp(log_crossing_probability(np.log(bounds))) == pytest.approx(crossing_by_steps(bounds), rel=1e-7)


def test_crossing_edges() -> None:
    assert log_crossing_probability([]) == -math.inf
    assert log_crossing_probability([-math.inf, -math.inf]) == -math.inf
    assert log_crossing_probability([-1.0, 0.0]) == 0.0
    # A bound below the one before adds nothing.
    assert log_crossing_probability([-1.0, -2.0, -0.5]) == log_crossing_probability([-1.0, -1.0, -0.5])
    # Far below the smallest float: P(U_(1) <= e^-2000) is 3 e^-2000 to first order.
    assert log_crossing_probability([-2000.0, -math.inf, -math.inf]) == pytest.approx(math.log(3) - 2000)
    # So near 1 that it rounds to 1: P(U_(2) <= b) = b^2.
    for log_bound in (-1e-12, -1e-17, -1e-320):
        assert log_crossing_probability([-math.inf, log_bound]) == pytest.approx(2.0 * log_bound, abs=2e-8)
    for bad in ([math.nan], [0.1], [[-1.0]]):
        with pytest.raises(ValueError, match="log_bounds must"):
            log_crossing_probability(bad)


def test_divergence_is_the_textbook_one() -> None:
    u, v = np.array([0.3, 0.3, 1.0, 0.5]), np.array([0.1, 0.4, 0.25, 0.5])
    kl = 0.3 * math.log(3) + 0.7 * math.log(0.7 / 0.9)
    np.testing.assert_allclose(divergence(u, v, 1.0), [kl, 0, math.log(4), 0], atol=1e-15)
    np.testing.assert_allclose(divergence(u, v, 2.0), [0.04 / 0.18, 0, 0.75**2 / (2 * 0.25 * 0.75), 0], atol=1e-15)
    hellinger = 4 * (1 - math.sqrt(0.03) - math.sqrt(0.63))
    np.testing.assert_allclose(divergence(u, v, 0.5), [hellinger, 0, 2.0, 0], atol=1e-15)
    # The family is continuous at order 1.
    np.testing.assert_allclose(divergence(u, v, 1 + 1e-6), divergence(u, v, 1.0), atol=1e-5)


@pytest.mark.parametrize(("order", "truncate"), [(1.0, None), (2.0, None), (2.0, 0.0), (0.5, 0.1), (1.5, None)])
def test_exact_p_value_against_simulation(order: float, truncate: float | None) -> None:
    # P(T >= t) at observed t, by 40,000 samples of uniforms: five standard errors, false alarm below 1e-6 each.
    rng = np.random.default_rng(2)
    n = 30
    samples = np.sort(rng.random((40_000, n)), axis=1)
    cut = 1 / n if truncate is None and order > 1 else truncate or 0.0
    simulated = n * divergence(np.arange(1, n + 1) / n, np.maximum(samples, cut), order).max(axis=1)
    checked = 0
    for push in (1.0, 0.9, 0.8, 0.6):
        result = divergence_test(seen(rng.random(n) ** (1 / push)), order=order, truncate=truncate)
        p = result.pvalue
        share = float(np.mean(simulated >= result.statistic))
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / 40_000) + 1e-9
        checked += 0 < p < 1
    assert checked >= 2


def size_is_kept(pvalues: np.ndarray) -> bool:
    """Whether no more are small than a binomial at its 1 - 1e-6 quantile: false alarm 1e-6 for each of three levels."""
    return all(np.sum(pvalues <= a) <= stats.binom.ppf(1 - 1e-6, len(pvalues), a) for a in (0.1, 0.05, 0.01))


def test_size_on_a_repetitive_text_over_keys(make_key: MakeKey, zipf_ids: Callable[[int, int], np.ndarray]) -> None:
    ids = np.tile(zipf_ids(40, 1), 5)
    found = [pivots(ids, make_key(number)) for number in range(200)]
    exact = [[berk_jones_test(one).pvalue, divergence_test(one).pvalue] for one in found]
    for pvalues in np.array(exact).T:
        assert size_is_kept(pvalues)
    assert stats.kstest(np.array(exact)[:, 0], "uniform").pvalue > 1e-6  # exact, not only conservative
    # The near-miss: the smallest binomial p-value over all shares, not corrected for the search.
    n = len(found[0].words)
    i = np.arange(1, n + 1)
    smallest = [np.min(special.betainc(i, n - i + 1, (np.sort(one.words) + 1.0) / 2**32)) for one in found]
    assert not size_is_kept(np.array(smallest))


def test_finds_the_few_tokens_that_an_editor_left() -> None:
    # 3 % of 2,000 tokens still show the mark, drawn at probability 0.002; the sum of all scores drowns them.
    rng = np.random.default_rng(3)
    gains = []
    for _ in range(8):
        r = rng.random(2000)
        r[:60] = 1 - rng.random(60) ** 0.002
        found = seen(r)
        gains.append(sum_test(found).log10_pvalue - berk_jones_test(found).log10_pvalue)
    # If neither test were better, all 8 would be above 0 with probability 1/256; they are so by four decimal digits.
    assert min(gains) > 0
    assert np.median(gains) > 4
    # And it reaches far down where the mark is whole.
    assert berk_jones_test(seen(1 - rng.random(500) ** 0.1)).log10_pvalue < -100


def test_calibrated_e_value_has_mean_one() -> None:
    # In x = log p: the integral of e(p) p dx. Below the grid e(p) p is 1 / x^2.
    x = np.concatenate([-np.geomspace(1e6, 1e-6, 20_001), [0.0]])
    mass = np.exp([log_calibrated(float(one)) + one for one in x])
    assert np.trapezoid(mass, x) + 1e-6 == pytest.approx(1.0, abs=1e-5)
    assert log_calibrated(0.0) == pytest.approx(math.log(0.5))
    assert log_calibrated(-0.01) == pytest.approx(log_calibrated(-0.010001), abs=1e-6)
    assert log_calibrated(-math.inf) == math.inf


def test_edges() -> None:
    empty = berk_jones_test(seen(np.empty(0)))
    assert (empty.log_pvalue, empty.log_evalue, empty.n_scored) == (0.0, 0.0, 0)
    assert berk_jones_test(seen(np.array([0.999999999]))).pvalue > 0.99
    assert berk_jones_test(seen(np.array([0.25]))).pvalue == pytest.approx(0.25, rel=1e-6)
    assert divergence_test(seen(np.array([1e-9]))).pvalue == 1.0  # truncated at 1 / n = 1
    for order in (0.0, 2.1, math.nan):
        with pytest.raises(ValueError, match=r"order must be in \(0, 2\], got"):
            divergence_test(seen(np.array([0.5])), order=order)
    for truncate in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"truncate must be in \[0, 1\), got"):
            divergence_test(seen(np.array([0.5])), truncate=truncate)
