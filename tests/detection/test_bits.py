"""Laws of counts and weighted counts against exact rational arithmetic; e-values by enumeration of all outcomes."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from assay.detection import bits
from assay.detection.convolution import log_weighted_count_sf
from assay.watermark._coins import Coins


def exact_law(weights: list[int], chance: Fraction) -> dict[int, int]:
    """Masses of sum w B times denominator**n, by convolution in whole numbers."""
    yes, no = chance.numerator, chance.denominator - chance.numerator
    law = {0: 1}
    for weight in weights:
        after: dict[int, int] = {}
        for value, mass in law.items():
            after[value] = after.get(value, 0) + mass * no
            after[value + weight] = after.get(value + weight, 0) + mass * yes
        law = after
    return law


def exact_tail(weights: list[int], chance: Fraction, observed: int) -> Fraction:
    above = sum(mass for value, mass in exact_law(weights, chance).items() if value >= observed)
    return Fraction(above, chance.denominator ** len(weights))


def log_of(value: Fraction) -> float:
    with mpmath.workdps(30):
        return float(mpmath.log(mpmath.mpf(value.numerator) / mpmath.mpf(value.denominator)))


def coins_of(outcomes: np.ndarray) -> Coins:
    return Coins(np.arange(len(outcomes)), outcomes, len(outcomes), 0)


@pytest.mark.parametrize(
    ("k", "n", "chance"),
    [
        (1, 1, "1/4"),
        (30, 100, "1/4"),
        (99, 100, "1/4"),
        (1400, 1500, "1/4"),
        (900, 900, "1/2"),
        (1, 700, "1/1000"),
        (1900, 2000, "3/4"),
        (1200, 1201, "1/16"),
    ],
)
def test_binomial_tails_against_exact_fractions(k: int, n: int, chance: str) -> None:
    p = Fraction(chance)
    yes, no = p.numerator, p.denominator - p.numerator
    ways = sum(math.comb(n, j) * yes**j * no ** (n - j) for j in range(k, n + 1))
    exact = log_of(Fraction(ways, p.denominator**n))
    got = float(bits.log_binomial_sf(np.array([k]), np.array([n]), float(p))[0])
    assert abs(got - exact) < 1e-9 * max(1.0, abs(exact))


def test_binomial_tails_are_continuous_where_the_method_changes() -> None:
    k = np.arange(300, 1001)
    tails = bits.log_binomial_sf(k, np.full(len(k), 1000), 0.25)
    assert tails[0] > math.log(1e-5)
    assert tails[-1] < math.log(1e-300)
    steps = np.diff(tails)
    assert (np.diff(steps) < 1e-8).all()  # the log tail is concave, across the change too
    scipy = stats.binom.logsf(k[:200] - 1, 1000, 0.25)
    np.testing.assert_allclose(tails[:200], scipy, rtol=1e-9)


def test_edges_of_the_binomial() -> None:
    got = bits.log_binomial_sf(np.array([0, -3, 1, 0, 6]), np.array([0, 5, 0, 5, 5]), 0.3)
    np.testing.assert_array_equal(got, [0.0, 0.0, -np.inf, 0.0, -np.inf])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-9, 30), min_size=1, max_size=40),
    st.sampled_from(["1/4", "1/2", "9/10", "1/100"]),
    st.floats(-0.1, 1.1),
)
def test_weighted_tails_against_exact_fractions(weights: list[int], chance: str, where: float) -> None:
    low, high = sum(w for w in weights if w < 0), sum(w for w in weights if w > 0)
    observed = round(low + where * (high - low))
    exact = exact_tail(weights, Fraction(chance), observed)
    got = log_weighted_count_sf(np.array(weights), float(Fraction(chance)), observed)
    if exact == 0:
        assert got == -math.inf
    else:
        assert abs(got - log_of(exact)) < 1e-8 * max(1.0, abs(log_of(exact)))


def test_weighted_tails_keep_their_digits_far_out() -> None:
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 8, 250).tolist()
    law = exact_law(weights, Fraction(1, 16))
    for share in (0.2, 0.5, 0.95, 0.999):
        observed = round(share * sum(weights))
        above = sum(mass for value, mass in law.items() if value >= observed)
        exact = log_of(Fraction(above, 16**250))
        assert abs(log_weighted_count_sf(np.array(weights), 1 / 16, observed) - exact) < 1e-8
    assert exact < math.log(1e-280)
    # The near-miss: the same sum without the tilt. Its digits end at the rounding of the largest mass, near 1e-17.
    transform = np.prod([15 / 16 + np.exp(-2j * np.pi * np.arange(8192) * w / 8192) / 16 for w in weights], axis=0)
    plain = np.fft.ifft(transform).real[observed:].sum()
    assert plain <= 0 or abs(math.log(plain) - exact) > 1


def test_equal_weights_are_the_binomial() -> None:
    for k in (0, 900, 2500, 3000):
        tail = log_weighted_count_sf(np.full(3000, 7), 0.25, 7 * k)
        assert tail == pytest.approx(float(bits.log_binomial_sf(np.array([k]), np.array([3000]), 0.25)[0]), rel=1e-10)


def test_a_grid_that_does_not_hold_the_whole_law_changes_nothing() -> None:
    # 60,000 coins: the sum runs to 1.9 million, the grid is far shorter.
    weights = np.random.default_rng(2).integers(0, 64, 60_000)
    mean, spread = 0.5 * weights.sum(), 0.5 * math.sqrt(float(np.sum(weights.astype(float) ** 2)))
    for z in (-2.0, 0.0, 2.0, 5.0):
        got = log_weighted_count_sf(weights, 0.5, round(mean + z * spread))
        assert got == pytest.approx(stats.norm.logsf(z), rel=3e-3, abs=3e-4)


def test_no_coins_and_no_weights() -> None:
    assert log_weighted_count_sf(np.empty(0, dtype=np.int64), 0.25, 0) == 0.0
    assert log_weighted_count_sf(np.zeros(5, dtype=np.int64), 0.25, 0) == 0.0
    assert log_weighted_count_sf(np.zeros(5, dtype=np.int64), 0.25, 1) == -math.inf
    empty = coins_of(np.empty((0, 1), dtype=np.bool_))
    assert bits.sum_test(empty, 0.25, scheme="x", assumptions=()).pvalue == 1.0
    aware = bits.model_aware_test(empty, np.empty((0, 1)), 0.25, scheme="x", assumptions=())
    assert (aware.pvalue, aware.log_evalue) == (1.0, 0.0)
    assert bits.robust_test(empty, np.empty(0), scheme="x", assumptions=()).log_evalue == pytest.approx(0.0, abs=1e-12)


def all_outcomes(n: int) -> np.ndarray:
    return np.array(list(itertools.product((False, True), repeat=n)))


@pytest.mark.parametrize("chance", [0.25, 0.5])
def test_every_test_is_valid_over_all_outcomes(chance: float) -> None:
    # Ten coins, all 1,024 outcomes with their exact chances: no Monte Carlo.
    log_odds = np.random.default_rng(3).normal(0.8, 1.0, 10)
    outcomes = all_outcomes(10)
    chances = np.prod(np.where(outcomes, chance, 1 - chance), axis=1)
    found = []
    for row in outcomes:
        coins = coins_of(row[:, None])
        ratios = bits.log_ratios(row[:, None], log_odds[:, None], chance)[:, 0]
        found.append(
            (
                bits.sum_test(coins, chance, scheme="x", assumptions=()),
                bits.model_aware_test(coins, log_odds[:, None], chance, scheme="x", assumptions=()),
                bits.robust_test(coins, ratios, scheme="x", assumptions=()),
            )
        )
    for tests in zip(*found, strict=True):
        evalues = np.array([test.evalue for test in tests])
        assert np.sum(chances * evalues) == pytest.approx(1.0, rel=1e-9)
        pvalues = np.array([test.pvalue for test in tests])
        order = np.argsort(pvalues)
        size = np.cumsum(chances[order])
        for p in np.unique(pvalues):
            assert size[np.searchsorted(pvalues[order], p, side="right") - 1] <= p * (1 + 1e-9)
    # The near-miss: half the p-value of each outcome added back (mid-p) is not valid.
    exact = np.array([test.pvalue for test in next(itertools.islice(zip(*found, strict=True), 0, 1))])
    counts = outcomes.sum(axis=1)
    middle = exact - 0.5 * stats.binom.pmf(counts, 10, chance)
    assert any(np.sum(chances[middle <= p]) > p * (1 + 1e-9) for p in middle)


def test_the_weighted_test_is_the_likelihood_ratio_test() -> None:
    # Outcomes in the order of their p-values are in the order of their likelihood ratios, up to rounded weights.
    log_odds = np.array([0.5, 1.0, 2.0, 4.0])
    outcomes = all_outcomes(4)
    tests = [
        bits.model_aware_test(coins_of(row[:, None]), log_odds[:, None], 0.25, scheme="x", assumptions=())
        for row in outcomes
    ]
    order = np.argsort([test.log_pvalue for test in tests], kind="stable")
    ratios = np.array([test.log_evalue for test in tests])[order]
    assert (np.diff(ratios) <= 1e-9).all()


def test_log_odds_are_bounded() -> None:
    odds = bits.log_odds_of(np.array([0.0, 1.0, 0.25, np.nan]), 0.25)
    np.testing.assert_allclose(odds, [-12.0, 12.0, 0.0, 0.0], atol=1e-12)


def test_documents_equal_single_tests() -> None:
    rng = np.random.default_rng(4)
    outcomes = rng.random((60, 3)) < 0.4
    offsets = np.array([0, 0, 25, 27, 80, 100])
    positions = np.sort(rng.choice(100, 60, replace=False))
    batch = bits.documents_sum_test(positions, outcomes, offsets, 2, 0.25)
    for d in range(5):
        inside = (positions >= offsets[d]) & (positions < offsets[d + 1])
        single = bits.sum_test(coins_of(outcomes[inside]), 0.25, scheme="x", assumptions=())
        assert (batch.statistic[d], batch.n_scored[d]) == (single.statistic, single.n_scored)
        assert (batch.log_pvalue[d], batch.log_evalue[d]) == (single.log_pvalue, single.log_evalue)
