"""The gap bound and Freedman's test: their lemmas on random laws, their tails by enumeration, near-misses rejected."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import all_texts, statistics_of
from scipy import optimize

from assay.detection.zero_shot import freedman_test, gap_log_bounds, gap_test, max_varentropy
from assay.detection.zero_shot.bounds import _RATES, _excess, mixed_process

LAWS = st.tuples(st.integers(2, 40), st.floats(0.05, 3.0), st.integers(0, 10**6))


def law(size: int, concentration: float, seed: int) -> np.ndarray:
    """A random law; one in three has a dominant token and a thin tail, the worst kind for these bounds."""
    rng = np.random.default_rng([size, seed])
    p = rng.dirichlet(np.full(size, concentration)) + 1e-12
    if seed % 3 == 0:
        p = np.append(np.full(size - 1, 10 ** rng.uniform(-8, -1) / size), 1.0)
    return p / p.sum()


def moments(p: np.ndarray) -> tuple[np.ndarray, float, float]:
    x = -np.log(p)
    h = float(p @ x)
    return x, h, float(p @ (x - h) ** 2)


@given(LAWS)
@settings(max_examples=300, deadline=None)
def test_no_law_has_more_varentropy_than_the_bound(parameters):
    p = law(*parameters)
    assert moments(p)[2] <= max_varentropy(len(p))


@pytest.mark.parametrize("size", [2, 3, 10, 500, 2048, 128256])
def test_the_varentropy_bound_is_nearly_attained(size):
    # The largest varentropy is that of one token against equal others; the bound may exceed it by less than 1.
    def negative(w: float) -> float:
        return -w * (1 - w) * (math.log(w / (1 - w)) + math.log(size - 1)) ** 2

    grid = np.linspace(1e-4, 1 - 1e-4, 4001)
    start = grid[int(np.argmin([negative(w) for w in grid]))]
    best = -optimize.minimize_scalar(negative, bounds=(max(start - 1e-3, 1e-9), min(start + 1e-3, 1.0))).fun
    assert best <= max_varentropy(size) < best + 1


@given(LAWS, st.floats(-20, 0.999))
@settings(max_examples=400, deadline=None)
def test_cumulant_is_below_the_gamma_law_s(parameters, s):
    p = law(*parameters)
    x, h, _ = moments(p)
    cumulant = float(np.log(np.sum(np.exp(np.log(p) + s * (x - h)))))
    v = max_varentropy(len(p))
    assert cumulant <= v * (-math.log1p(-s) - s) + 1e-9


def test_half_the_varentropy_bound_is_too_small():
    # The near-miss of the two tests above: the two-level law breaks the inequality with half the constant.
    p = np.append(np.full(499, 0.3 / 499), 0.7)
    x, h, v = moments(p)
    half = max_varentropy(500) / 2
    assert v > half
    s = 0.05
    assert np.log(np.sum(p * np.exp(s * (x - h)))) > half * (-math.log1p(-s) - s)


@given(LAWS, st.sampled_from(list(_RATES)))
@settings(max_examples=400, deadline=None)
def test_each_side_of_freedman_is_a_supermartingale(parameters, rate):
    p = law(*parameters)
    x, h, v = moments(p)
    index, limit = int(np.flatnonzero(rate == _RATES)[0]), math.log(len(p))
    reach = h + math.log(p.max())
    cost = [float(v * _excess(_RATES, np.array([b]))[0, index]) for b in (limit, reach)]
    assert p @ np.exp(rate * np.minimum(x - h, limit) - cost[0]) <= 1 + 1e-12
    assert p @ np.exp(-rate * (x - h) - cost[1]) <= 1 + 1e-12


def test_freedman_without_the_clip_or_without_the_range_is_no_supermartingale():
    # Two near-misses that textbooks invite: surprisals are unbounded above, and V / 2 alone is Gaussian.
    p = np.append(np.full(9, 1e-9), 1.0)
    p /= p.sum()
    x, h, v = moments(p)
    cost = float(v * _excess(_RATES, np.array([math.log(10)]))[0, -1])
    assert p @ np.exp(np.minimum(x - h, math.log(10)) - cost) <= 1
    assert p @ np.exp(x - h - cost) > 1 + 1e-9
    q = np.array([0.95, 0.05])
    x, h, v = moments(q)
    assert q @ np.exp((x - h) - v / 2) > 1.01


def test_excess_against_its_definition():
    rates = np.array([0.25, 1.0])
    for b in (1e-9, 1e-4, 0.9e-3, 1.1e-3, 0.5, 11.0):
        exact = [float((math.exp(r * b) - 1 - r * b) / b**2) if r * b > 1e-2 else None for r in rates]
        found = _excess(rates, np.array([b]))[0]
        for r, one, two in zip(rates, found, exact, strict=True):
            series = r**2 * sum((r * b) ** k / math.factorial(k + 2) for k in range(12))
            np.testing.assert_allclose(one, series if two is None else two, rtol=1e-9)


@pytest.mark.parametrize("size", [2, 3])
def test_tails_by_complete_enumeration(size):
    # Every text of a history-dependent model: the exact size of both tests, at every level that occurs.
    length = 7 if size == 2 else 5
    for test in (gap_test, freedman_test):
        found = [
            (test(statistics_of(laws, np.array(tokens)), candidates=size), probability)
            for tokens, laws, probability in all_texts(length, size, 5)
        ]
        assert sum(probability for _, probability in found) == pytest.approx(1)
        order = sorted(found, key=lambda one: one[0].log_pvalue)
        cumulative = np.cumsum([probability for _, probability in order])
        pvalues = np.array([result.pvalue for result, _ in order])
        assert np.all(cumulative <= pvalues + 1e-12)
        assert sum(probability * result.evalue for result, probability in found) <= 1 + 1e-12


def test_gap_bound_against_a_fine_maximisation():
    # exp(-n sup_s (s t - g(s))) with g of Theorem 2, the supremum taken by brute force.
    for gap, size in ((0.01, 50), (0.7, 2048), (3.0, 2), (1.2, 2)):
        v = max_varentropy(size)
        above, below = gap_log_bounds(gap, 7, size)
        up = np.linspace(0, 1, 400001)[:-1]
        down = -np.geomspace(1e-6, 1e5, 400001)
        np.testing.assert_allclose(above, -7 * np.max(up * gap - v * (-np.log1p(-up) - up)), rtol=1e-4)
        rate = np.max(-down * gap - v * (-np.log1p(-down) - down))
        assert below == -math.inf if gap >= v else below == pytest.approx(-7 * rate, rel=1e-4)
    assert gap_log_bounds(0.0, 5, 10) == (0.0, 0.0)
    assert gap_log_bounds(1.0, 0, 10) == (0.0, 0.0)
    assert gap_log_bounds(math.inf, 5, 10) == (-math.inf, -math.inf)
    assert gap_log_bounds(1e-9, 10**6, 10)[0] < 0


@pytest.mark.parametrize("test", [gap_test, freedman_test])
def test_nothing_and_the_impossible(test):
    laws = np.array([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])
    nothing = test(statistics_of(laws[:0], np.array([], dtype=int)), candidates=3)
    assert (nothing.log_pvalue, nothing.log_evalue, nothing.n_scored) == (0.0, 0.0, 0)
    impossible = test(statistics_of(laws, np.array([0, 2])), candidates=3)
    assert impossible.log_pvalue == -math.inf
    assert impossible.log_evalue == math.inf
    certain = test(statistics_of(np.array([[1.0, 0.0]] * 4), np.zeros(4, dtype=int)), candidates=2)
    assert certain.log_pvalue == 0.0


@pytest.mark.parametrize("bad", [0, -3, 1.5, True])
def test_bad_candidates(bad):
    with pytest.raises(ValueError, match="candidates must be an integer >= 1"):
        max_varentropy(bad)


@pytest.mark.parametrize(("gap", "n"), [(-0.1, 5), (math.nan, 5), (0.1, -1)])
def test_bad_gaps(gap, n):
    with pytest.raises(ValueError, match="gap and n must be at least 0"):
        gap_log_bounds(gap, n, 10)


def test_mixed_process_counts_its_start():
    last, highest = mixed_process(np.full((3, 2), -1.0))
    assert last == pytest.approx(-3)
    assert highest == 0.0
