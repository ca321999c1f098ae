"""Tails against mpmath in 900 digits: partial fractions for distinct weights, incomplete gamma for equal ones."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from assay.detection.tails import log_gamma_sf, log_weighted_exponential_cdf


def exact_log_cdf(weights: np.ndarray, s: float) -> float:
    """log P(sum w E <= s) by partial fractions; exact for distinct weights given enough digits."""
    with mpmath.workdps(900):
        w = [mpmath.mpf(float(x)) for x in weights]
        total = mpmath.mpf(0)
        for i, a in enumerate(w):
            share = mpmath.mpf(1)
            for j, b in enumerate(w):
                if i != j:
                    share *= a / (a - b)
            total += share * -mpmath.expm1(-mpmath.mpf(s) / a)
        return float(mpmath.log(total))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_weighted_exponential_against_partial_fractions(n: int, spread: float) -> None:
    rng = np.random.default_rng(100 * n + int(10 * spread))
    weights = np.exp(rng.normal(0, spread, n))
    for share in (1e-12, 1e-6, 1e-3, 0.1, 0.5, 1.0, 3.0):
        s = float(weights.sum() * share)
        error = math.expm1(log_weighted_exponential_cdf(weights, s) - exact_log_cdf(weights, s))
        assert abs(error) < 1e-6


def test_weighted_exponential_reaches_1e_minus_300() -> None:
    rng = np.random.default_rng(1)
    weights = np.exp(rng.normal(0, 1, 24))
    s = float(weights.sum()) * 5e-13
    value = log_weighted_exponential_cdf(weights, s)
    assert -720 < value < -650  # the probability is about 1e-300
    assert abs(math.expm1(value - exact_log_cdf(weights, s))) < 1e-6


@pytest.mark.parametrize(
    ("n", "share"),
    # Only where scipy's own log cdf does not underflow.
    [*((n, share) for n in (1, 10, 1000) for share in (0.8, 0.97, 1.0, 1.2)), (20_000, 0.97), (20_000, 1.0)],
)
def test_equal_weights_are_a_gamma_law(n: int, share: float) -> None:
    expected = stats.gamma.logcdf(n * share, n)
    assert log_weighted_exponential_cdf(np.full(n, 2.0), 2.0 * n * share) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_near_equal_weights_where_partial_fractions_in_floats_fail() -> None:
    weights = 1 + 1e-9 * np.arange(40)
    assert log_weighted_exponential_cdf(weights, 4.0) == pytest.approx(stats.gamma.logcdf(4.0, 40), abs=1e-6)


def test_weighted_exponential_against_simulation() -> None:
    rng = np.random.default_rng(7)
    weights = np.exp(rng.normal(0, 2, 30))
    sums = rng.exponential(size=(200_000, 30)) @ weights
    for q in (0.001, 0.05, 0.5):
        s = float(np.quantile(sums, q))
        exact = math.exp(log_weighted_exponential_cdf(weights, s))
        # Five standard errors: false alarm below 1e-6 at this fixed seed.
        assert abs(exact - q) < 5 * math.sqrt(q * (1 - q) / 200_000)


def test_weighted_exponential_edges() -> None:
    assert log_weighted_exponential_cdf(np.ones(3), 0.0) == -math.inf
    assert log_weighted_exponential_cdf(np.ones(3), math.inf) == 0.0
    assert log_weighted_exponential_cdf(np.empty(0), 1.0) == 0.0
    for bad in (np.array([1.0, 0.0]), np.array([1.0, -1.0]), np.array([np.nan]), np.array([np.inf]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="weights must be"):
            log_weighted_exponential_cdf(bad, 1.0)
    with pytest.raises(ValueError, match="s must be at least 0, got -1"):
        log_weighted_exponential_cdf(np.ones(1), -1.0)


@pytest.mark.parametrize(
    ("n", "s"),
    [
        (1, 2000.0),
        (2, 900.0),
        (10, 1500.0),
        (31, 4000.0),
        (32, 4000.0),
        (100, 900.0),
        (1000, 5000.0),
        (3000, 9000.0),
        (400, 300.0),
        (10_000_000, 1.02e7),  # here n log s and log Gamma(n) agree in eight digits
    ],
)
def test_gamma_tail_against_mpmath(n: int, s: float) -> None:
    with mpmath.workdps(60):
        exact = float(mpmath.log(mpmath.gammainc(n, s, mpmath.inf, regularized=True)))
    value = log_gamma_sf(np.array([n]), np.array([s]))[0]
    assert abs(math.expm1(value - exact)) < 1e-8


def test_gamma_tail_is_continuous_where_the_method_changes() -> None:
    n = 50
    s = np.linspace(600, 760, 400)  # the probability crosses 1e-200 in here
    values = log_gamma_sf(np.full(400, n), s)
    assert values[0] > math.log(1e-200) > values[-1]
    curvature = np.abs(np.diff(values, 2))
    assert curvature.max() < 1e-4


def test_gamma_tail_edges() -> None:
    n = np.array([0, 0, 5, 5, 10_000_000])
    s = np.array([0.0, 1.0, 0.0, np.inf, 1e7])
    values = log_gamma_sf(n, s)
    assert values[:4].tolist() == [0.0, -math.inf, 0.0, -math.inf]
    assert values[4] == pytest.approx(math.log(0.5), abs=1e-3)
