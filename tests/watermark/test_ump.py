"""UMP couplings and errors against linear programs that know nothing of their form, exact sums, and simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog

from assay.watermark import ump


def laws(rng, count, largest):
    """Random laws, some with atoms of probability zero, some uniform."""
    for i in range(count):
        n = int(rng.integers(1, largest + 1))
        rho = rng.dirichlet(np.full(n, rng.choice([0.2, 1.0, 5.0])))
        if i % 5 == 0 and n > 1:
            rho[rng.integers(n)] = 0.0
        yield np.full(n, 1 / n) if i % 7 == 0 else rho / rho.sum()


def watermark_lp(rho, alpha, distortion):
    """The best Type II error over ALL joint laws of (X, R), R any subset: variables P(x, R), and the mass moved."""
    n = len(rho)
    regions = list(itertools.product([0, 1], repeat=n))
    pairs = [(x, r) for x in range(n) for r in range(len(regions))]
    cost = np.array([0.0 if regions[r][x] else 1.0 for x, r in pairs] + [0.0] * n)
    level = np.array([[float(regions[r][y]) for x, r in pairs] + [0.0] * n for y in range(n)])
    # |q - rho| <= s elementwise and sum s <= 2 distortion.
    marginal = np.array([[float(x == z) for x, r in pairs] for z in range(n)])
    above = np.hstack([marginal, -np.eye(n)])
    below = np.hstack([-marginal, -np.eye(n)])
    moved = np.concatenate([np.zeros(len(pairs)), np.ones(n)])[None, :]
    a_ub = np.vstack([level, above, below, moved])
    b_ub = np.concatenate([np.full(n, alpha), rho, -rho, [2 * distortion]])
    total = np.concatenate([np.ones(len(pairs)), np.zeros(n)])[None, :]
    solution = linprog(cost, A_ub=a_ub, b_ub=b_ub, A_eq=total, b_eq=[1.0])
    assert solution.success
    return solution.fun


def test_type2_error_equals_the_lp_over_all_watermarks():
    rng = np.random.default_rng(1)
    positive = 0
    for i, rho in enumerate(laws(rng, 60, 4)):
        alpha, distortion = rng.uniform(0.01, 0.6), (0.0 if i % 3 == 0 else rng.uniform(0, 0.4))
        expected = watermark_lp(rho, alpha, distortion)
        assert ump.type2_error(rho, alpha, distortion) == pytest.approx(expected, abs=1e-9)
        positive += expected > 1e-3
    assert positive > 20  # the comparison is not one of zeros


def test_coupling_is_exact_in_rational_arithmetic():
    rng = np.random.default_rng(2)
    for rho in laws(rng, 100, 30):
        alpha, distortion = float(rng.uniform(0.01, 0.3)), float(rng.choice([0.0, 0.1, 1.0]))
        coupling = ump.optimal_coupling(rho, alpha, distortion)
        joint = coupling.joint()
        assert all(Fraction(float(hit)) <= Fraction(alpha) for hit in joint[:, 0])  # Type I, exactly
        rows = [Fraction(float(hit)) + Fraction(float(miss)) for hit, miss in joint]
        np.testing.assert_allclose([float(row) for row in rows], coupling.law, rtol=1e-15, atol=0)
        assert float(sum(rows)) == pytest.approx(1.0, abs=1e-14)
        assert 0.5 * np.abs(coupling.law - rho).sum() == pytest.approx(coupling.distortion, abs=1e-14)
        assert coupling.distortion <= distortion + 1e-15
        assert coupling.type2_error == pytest.approx(ump.type2_error(rho, alpha, distortion), abs=1e-14)
        if distortion == 0.0:
            np.testing.assert_allclose(coupling.law, rho, rtol=1e-15)


def test_samples_follow_the_coupling():
    # Four-sigma bands on 200,000 draws: false alarm below 1e-3 over the ten cells.
    coupling = ump.optimal_coupling([0.5, 0.3, 0.15, 0.05, 0.0], 0.2, 0.05)
    size = 200_000
    x, region = coupling.sample(np.random.default_rng(3), size)
    assert np.all((region == x) | (region == ump.NO_REGION))
    joint = coupling.joint()
    for atom in range(5):
        for observed, p in (
            (np.mean((x == atom) & (region == atom)), joint[atom, 0]),
            (np.mean((x == atom) & (region == ump.NO_REGION)), joint[atom, 1]),
        ):
            assert abs(observed - p) <= 4 * math.sqrt(p * (1 - p) / size) + 1e-12


def agnostic_lp(rho, k):
    """Largest P(X in R) with R uniform over k-subsets: a flow from regions to atoms, by linear programming."""
    n = len(rho)
    regions = list(itertools.combinations(range(n), k))
    edges = [(i, x) for i, region in enumerate(regions) for x in region]
    from_region = np.array([[float(i == j) for i, x in edges] for j in range(len(regions))])
    to_atom = np.array([[float(x == z) for i, x in edges] for z in range(n)])
    limits = np.concatenate([np.full(len(regions), 1 / len(regions)), rho])
    solution = linprog(-np.ones(len(edges)), A_ub=np.vstack([from_region, to_atom]), b_ub=limits)
    assert solution.success
    return 1.0 + solution.fun


def test_agnostic_error_and_coupling_against_the_flow_lp():
    rng = np.random.default_rng(4)
    for rho in laws(rng, 60, 7):
        k = int(rng.integers(1, len(rho) + 1))
        coupling = ump.agnostic_coupling(rho, k)
        regions, joint = coupling.joint()
        inside = sum(joint[i, region].sum() for i, region in enumerate(regions))
        assert ump.agnostic_type2_error(rho, k) == pytest.approx(agnostic_lp(rho, k), abs=1e-9)
        assert 1.0 - inside == pytest.approx(ump.agnostic_type2_error(rho, k), abs=1e-13)
        assert coupling.type2_error == pytest.approx(ump.agnostic_type2_error(rho, k), abs=1e-13)
        np.testing.assert_allclose(joint.sum(axis=0), rho, atol=1e-14)  # X ~ rho
        np.testing.assert_allclose(joint.sum(axis=1), 1 / math.comb(len(rho), k), atol=1e-14)  # R uniform
        assert joint.min() >= 0.0


def test_agnostic_samples_in_a_space_too_large_to_enumerate():
    # C(60, 6) = 50 million regions. Five-sigma bands: false alarm below 1e-4 over 121 cells.
    rng = np.random.default_rng(5)
    rho = rng.dirichlet(np.full(60, 0.3))
    coupling = ump.agnostic_coupling(rho, 6)
    size = 40_000
    x, regions = coupling.sample(rng, size)
    assert regions.shape == (size, 6)
    assert np.all(np.diff(regions, axis=1) > 0)
    missed = np.mean(~(regions == x[:, None]).any(axis=1))
    bound = 5 * np.sqrt(0.25 / size)
    assert abs(missed - ump.agnostic_type2_error(rho, 6)) < bound
    assert np.all(np.abs(np.bincount(x, minlength=60) / size - rho) < 5 * np.sqrt(rho / size) + 2e-4)
    cover = np.bincount(regions.ravel(), minlength=60) / size
    assert np.all(np.abs(cover - 0.1) < 5 * math.sqrt(0.09 / size))
    # Near-miss: drawing X independently of R would be missed nine times in ten.
    assert abs(missed - 0.9) > 10 * bound


def test_minimax_excess_is_the_worst_excess():
    rng = np.random.default_rng(6)
    for n, k in [(12, 3), (12, 4), (7, 2), (7, 3), (10, 4), (30, 1), (5, 5), (1, 1)]:
        flat = [np.r_[np.full(a, 1 / a), np.zeros(n - a)] for a in range(1, n + 1)]
        random = [rng.dirichlet(np.full(n, s)) for s in (0.1, 0.5, 1, 5) for _ in range(200)]
        # Where n / k is not whole the worst law has floor(n / k) atoms of alpha and spreads the rest.
        a = n // k
        spread = [np.r_[np.full(a, k / n), np.full(n - a, (1 - a * k / n) / max(1, n - a))]]
        alpha = k / n
        excess = [ump.agnostic_type2_error(r, k) - np.maximum(r - alpha, 0).sum() for r in flat + random + spread]
        assert max(excess) == pytest.approx(ump.minimax_excess(n, k), abs=1e-12)


def test_minimax_excess_formula_and_limits():
    assert ump.minimax_excess(100, 10) == pytest.approx(math.comb(90, 10) / math.comb(100, 10), rel=1e-13)
    growing = [ump.minimax_excess(100 * m, m) for m in (1, 10, 100, 10_000)]
    assert growing == sorted(growing)
    assert growing[-1] == pytest.approx(0.99**100, rel=1e-3)
    assert ump.minimax_excess(10_000_000, 1000) == pytest.approx(math.exp(-1), abs=1e-3)
    assert ump.minimax_excess(10_000_000, 1000) < math.exp(-1)


def test_race_error_and_its_distance_from_the_best():
    rng = np.random.default_rng(7)
    for rho in laws(rng, 200, 40):
        for alpha in (1e-4, 0.03, 0.4):
            race, best = ump.race_type2_error(rho, alpha), ump.type2_error(rho, alpha)
            assert best - 1e-15 <= race <= best + math.exp(-1)
    # The race itself, run 100,000 times; four-sigma bands.
    rho, alpha, size = np.array([0.6, 0.3, 0.1]), 0.2, 100_000
    times = rng.exponential(size=(size, 3))
    x = np.argmin(times / rho, axis=1)
    missed = np.mean(times[np.arange(size), x] > -math.log1p(-alpha))
    assert abs(missed - ump.race_type2_error(rho, alpha)) < 4 * math.sqrt(0.25 / size)
    # Near-miss: the same formula with threshold alpha in place of -log(1 - alpha) is told apart.
    assert abs(missed - np.sum(rho * np.exp(-alpha / rho))) > 4 * math.sqrt(0.25 / size)


def test_small_errors_keep_their_digits():
    # exp(-t / rho) far below the smallest float is zero, not an error; tiny alpha is accepted.
    assert ump.race_type2_error([1.0 - 1e-12, 1e-12], 1e-3) == pytest.approx(1.0 - 1e-3, rel=1e-9)
    assert ump.type2_error([0.5, 0.5], 1e-300) == 1.0
    assert ump.agnostic_type2_error(np.full(1000, 1e-3), 1000) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ump.type2_error([0.5, 0.6], 0.1), "rho must sum to 1"),
        (lambda: ump.type2_error([1.5, -0.5], 0.1), "rho must hold finite probabilities"),
        (lambda: ump.type2_error([np.nan, 1.0], 0.1), "rho must hold finite probabilities"),
        (lambda: ump.type2_error([], 0.1), "rho must be a one-dimensional"),
        (lambda: ump.type2_error([[1.0]], 0.1), "rho must be a one-dimensional"),
        (lambda: ump.type2_error([1.0], 0.0), "alpha must be in"),
        (lambda: ump.type2_error([1.0], None), "alpha must be in"),
        (lambda: ump.type2_error([1.0], "0.1"), r"alpha must be in \(0, 1\), got '0.1'"),
        (lambda: ump.race_type2_error([1.0], 1.0), "alpha must be in"),
        (lambda: ump.type2_error([1.0], math.nan), "alpha must be in"),
        (lambda: ump.type2_error([1.0], 0.1, -0.1), "distortion must be in"),
        (lambda: ump.optimal_coupling([1.0], 0.1, 1.1), "distortion must be in"),
        (lambda: ump.agnostic_type2_error([0.5, 0.5], 0), "k must be a whole number in 1..2, got 0"),
        (lambda: ump.agnostic_coupling([0.5, 0.5], 3), "k must be a whole number in 1..2, got 3"),
        (lambda: ump.agnostic_coupling([0.5, 0.5], 1.5), "k must be a whole number"),
        (lambda: ump.agnostic_coupling([0.5, 0.5], math.nan), "k must be a whole number in 1..2, got nan"),
        (lambda: ump.agnostic_coupling([0.5, 0.5], None), "k must be a whole number in 1..2, got None"),
        (lambda: ump.minimax_excess(0, 1), "n must be a whole number"),
        (lambda: ump.minimax_excess(math.inf, 1), "n must be a whole number at least 1, got inf"),
        (lambda: ump.agnostic_coupling(np.full(13, 1 / 13), 2).joint(), "at most 12 atoms, got 13"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
