"""Robust watermarks: the program against another solver, certificates, and orbits against the full program."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from scipy import sparse, stats
from scipy.optimize import linprog

from assay.watermark import robust, ump


def product_law(law, n):
    rho = np.ones(1)
    for _ in range(n):
        rho = np.kron(rho, law)
    return rho


def hamming_relation(q, n, radius):
    texts = np.array(list(itertools.product(range(q), repeat=n)))
    return (texts[:, None, :] != texts[None]).sum(axis=2) <= radius


def check_certificates(solution, rho, relation, alpha):
    """Primal and dual feasibility, checked directly; with equal values they prove the optimum."""
    relation = np.asarray(relation, dtype=float)
    assert np.all(solution.plan >= 0)
    assert np.all(solution.plan <= rho * (1 + 1e-12))
    assert np.all(relation.T @ solution.plan <= alpha * (1 + 1e-12))
    assert 1 - solution.plan.sum() == pytest.approx(solution.type2_error, abs=1e-12)
    u, v = solution.text_prices, solution.region_prices
    assert np.all(u >= 0)
    assert np.all(v >= 0)
    assert np.all(u + relation @ v >= 1 - 1e-12)
    assert max(0.0, 1 - rho @ u - alpha * v.sum()) == pytest.approx(solution.lower_bound, abs=1e-12)
    assert -1e-12 <= solution.gap < 1e-8


def test_program_against_scipy_on_random_relations():
    rng = np.random.default_rng(1)
    for _ in range(60):
        n, m = rng.integers(1, 12, size=2)
        relation = rng.random((n, m)) < 0.3
        relation[np.arange(n), rng.integers(0, m, n)] = True
        rho, alpha = rng.dirichlet(np.full(n, 0.7)), 10 ** rng.uniform(-7, -0.1)
        solution = robust.robust_type2_error(rho, relation, alpha)
        # In units of alpha, where the other solver's tolerance does not hide the answer.
        other = linprog(
            -np.ones(n), A_ub=relation.T.astype(float), b_ub=np.ones(m), bounds=np.c_[np.zeros(n), rho / alpha]
        )
        assert solution.type2_error == pytest.approx(max(0.0, 1 + alpha * other.fun), abs=1e-9)
        check_certificates(solution, rho, relation, alpha)


def all_regions_lp(rho, relation, alpha):
    """The best robust error over ALL joint laws of (X, R), R any subset: the claim that R = B(x) is enough."""
    n, m = relation.shape
    regions = np.array(list(itertools.product([False, True], repeat=m)))
    pairs = list(itertools.product(range(n), range(len(regions))))
    cost = [0.0 if regions[r][relation[x]].all() else 1.0 for x, r in pairs]
    level = np.array([[float(regions[r][y]) for x, r in pairs] for y in range(m)])
    marginal = np.array([[float(x == z) for x, r in pairs] for z in range(n)])
    solution = linprog(cost, A_ub=level, b_ub=np.full(m, alpha), A_eq=marginal, b_eq=rho)
    assert solution.success
    return solution.fun


def test_no_other_region_does_better():
    rng = np.random.default_rng(2)
    for _ in range(25):
        n = int(rng.integers(2, 5))
        relation = (rng.random((n, n)) < 0.4) | np.eye(n, dtype=bool)
        rho, alpha = rng.dirichlet(np.ones(n)), rng.uniform(0.05, 0.6)
        expected = all_regions_lp(rho, relation, alpha)
        assert robust.robust_type2_error(rho, relation, alpha).type2_error == pytest.approx(expected, abs=1e-8)


def test_without_edits_it_is_the_ump_error():
    rho = np.random.default_rng(3).dirichlet(np.ones(20))
    assert robust.robust_type2_error(rho, np.eye(20), 0.03).type2_error == pytest.approx(
        ump.type2_error(rho, 0.03), abs=1e-10
    )
    iid = product_law([0.7, 0.2, 0.1], 6)
    orbits = robust.hamming_type2_error(6, [0.7, 0.2, 0.1], 0, 0.01)
    assert orbits.type2_error == pytest.approx(ump.type2_error(iid, 0.01), abs=1e-10)
    same = robust.hamming_type2_error(6, [0.7, 0.2, 0.1], 0, 0.01, edits="levenshtein")
    assert same.type2_error == orbits.type2_error


@pytest.mark.parametrize(
    ("law", "n", "radius"),
    [
        ([0.8, 0.2], 8, 2),
        ([0.95, 0.05], 8, 1),
        ([0.5, 0.5], 8, 3),
        ([0.6, 0.3, 0.1], 5, 1),
        ([0.6, 0.2, 0.2], 5, 2),
        ([0.4, 0.4, 0.2], 5, 1),
        ([0.25, 0.25, 0.25, 0.25], 4, 1),
        ([0.7, 0.3], 4, 4),
    ],
)
def test_orbits_equal_the_full_program(law, n, radius):
    rho, relation = product_law(law, n), hamming_relation(len(law), n, radius)
    for alpha in (0.003, 0.05, 0.4):
        full = robust.robust_type2_error(rho, relation, alpha)
        orbits = robust.hamming_type2_error(n, law, radius, alpha)
        assert orbits.type2_error == pytest.approx(full.type2_error, abs=1e-7)
        assert orbits.gap < 1e-8
        assert len(orbits.plan) == len(orbits.text_orbits)
        assert len(orbits.region_prices) == len(orbits.region_orbits)
        assert np.all(orbits.text_orbits.sum(axis=1) == n)


@pytest.mark.parametrize("alpha", [1e-12, 1e-6])
@pytest.mark.parametrize(("law", "n", "radius"), [([0.6, 0.4], 4, 2), ([0.5, 0.25, 0.25], 3, 1), ([0.9, 0.1], 6, 2)])
def test_levels_below_the_tolerance_of_the_solver(law, n, radius, alpha):
    rho, relation = product_law(law, n), hamming_relation(len(law), n, radius)
    full = robust.robust_type2_error(rho, relation, alpha)
    orbits = robust.hamming_type2_error(n, law, radius, alpha)
    # What is gained over the level 0 is a few alpha: it must be right in its own digits.
    assert 1.0 - orbits.type2_error == pytest.approx(1.0 - full.type2_error, rel=1e-3)
    assert alpha <= 1.0 - full.type2_error <= 2.0**n * alpha
    assert max(orbits.gap, full.gap) < 1e-3 * alpha + 1e-13


def test_a_vocabulary_of_equal_tokens_is_one_orbit():
    # Then w = alpha / |ball| for every text: Type II = 1 - alpha V^n / |ball|.
    ball = 1 + 5 * 999
    expected = 1 - 1e-9 * 1000.0**5 / ball
    assert expected < 0  # so the error is zero there, and the next level is the one to compare
    solution = robust.hamming_type2_error(5, np.full(1000, 1e-3), 1, 1e-13)
    assert solution.type2_error == pytest.approx(1 - 1e-13 * 1000.0**5 / ball, abs=1e-9)
    assert robust.hamming_type2_error(5, np.full(1000, 1e-3), 1, 1e-9).type2_error == pytest.approx(0.0, abs=1e-9)


def test_two_hundred_tokens_radius_five_within_seconds():
    began = time.perf_counter()
    errors = [robust.hamming_type2_error(200, [0.98, 0.02], radius, 1e-3) for radius in (0, 1, 3, 5)]
    assert time.perf_counter() - began < 10.0
    values = [solution.type2_error for solution in errors]
    assert values == sorted(values)
    assert 0.0 < values[0] < values[-1] < 1.0
    assert max(solution.gap for solution in errors) < 1e-8
    # Radius 0 is the UMP error, summed over types another way.
    ones = np.arange(201)
    log_rho = ones * np.log(0.02) + (200 - ones) * np.log(0.98)
    direct = np.sum(stats.binom.pmf(ones, 200, 0.02) * np.maximum(0.0, 1 - 1e-3 * np.exp(np.minimum(-log_rho, 700))))
    assert values[0] == pytest.approx(direct, abs=1e-9)


def levenshtein(a, b):
    """Edit distance by the textbook recursion."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        previous, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            previous, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, previous + (x != y))
    return row[-1]


@pytest.mark.parametrize(("n", "q", "radius"), [(4, 2, 1), (4, 2, 2), (3, 3, 1), (1, 2, 1)])
def test_levenshtein_neighbours_against_the_textbook(n, q, radius):
    texts = list(itertools.product(range(q), repeat=n))
    outputs = [y for k in range(n - radius, n + radius + 1) for y in itertools.product(range(q), repeat=k)]
    expected = np.array([[levenshtein(x, y) <= radius for y in outputs] for x in texts])
    np.testing.assert_array_equal(robust.levenshtein_neighbours(n, q, radius).toarray(), expected)


def test_order_matters_for_insertions_and_deletions():
    # The proof that the reduction fails: two texts of one type have balls of different size.
    sizes = np.asarray(robust.levenshtein_neighbours(4, 2, 1)[:, :8].sum(axis=1)).ravel()
    assert (sizes[0b0011], sizes[0b0101]) == (2, 4)
    law = [0.7, 0.3]
    full = robust.robust_type2_error(product_law(law, 6), robust.levenshtein_neighbours(6, 2, 1), 0.02)
    substitutions = robust.hamming_type2_error(6, law, 1, 0.02)
    assert full.type2_error > substitutions.type2_error + 1e-3  # far above either gap
    patterns = robust.levenshtein_type2_error(6, law, 1, 0.02)
    assert patterns.type2_error == pytest.approx(full.type2_error, abs=1e-7)
    with pytest.raises(ValueError, match="insertions and deletions see the order"):
        robust.hamming_type2_error(6, law, 1, 0.02, edits="levenshtein")


@pytest.mark.parametrize(
    ("law", "n", "radius"),
    [
        ([0.7, 0.3], 6, 1),
        ([0.5, 0.5], 6, 1),
        ([0.5, 0.5], 5, 2),
        ([0.4, 0.4, 0.2], 4, 1),
        ([0.25, 0.25, 0.25, 0.25], 4, 1),
        ([0.2, 0.2, 0.3, 0.3], 3, 2),
        ([0.6, 0.3, 0.1], 4, 1),
        ([1.0], 3, 1),
    ],
)
def test_patterns_equal_the_full_program_under_insertions_and_deletions(law, n, radius):
    rho, relation = product_law(law, n), robust.levenshtein_neighbours(n, len(law), radius)
    for alpha in (0.003, 0.03, 0.3):
        full = robust.robust_type2_error(rho, relation, alpha)
        patterns = robust.levenshtein_type2_error(n, law, radius, alpha)
        assert patterns.type2_error == pytest.approx(full.type2_error, abs=1e-7)
        assert patterns.gap < 1e-8
        assert len(patterns.plan) <= len(full.plan)


def test_a_large_vocabulary_of_equal_tokens_under_edits():
    # 52 patterns of five tokens, fewer up to mirroring. Almost all texts have five different tokens; their ball has
    # at most 1 + 5 * 999 texts of their own length, 6 * 1000 longer and 5 shorter, and what binds is the shorter ones:
    # each is within one insertion of about 5 * 1000 texts, so w = alpha / 5000 a text is about the best.
    solution = robust.levenshtein_type2_error(5, np.full(1000, 1e-3), 1, 2e-12)
    assert len(solution.plan) < 52
    assert solution.gap < 1e-6
    assert 1 - solution.type2_error == pytest.approx(2e-12 * 1000.0**5 / 5000, rel=0.02)
    with pytest.raises(ValueError, match="more than 20000 patterns"):
        robust.levenshtein_type2_error(16, [0.7, 0.3], 1, 0.1)
    with pytest.raises(ValueError, match=r"radius must be a whole number in 0\.\.4"):
        robust.levenshtein_type2_error(4, [0.5, 0.5], 5, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robust.robust_type2_error([0.5, 0.4], np.eye(2), 0.1), "rho must sum to 1"),
        (lambda: robust.robust_type2_error([0.5, 0.5], np.eye(3), 0.1), "neighbours must have shape"),
        (lambda: robust.robust_type2_error([0.5, 0.5], [[0], [0, 1]], 0.1), "rows of different lengths"),
        (lambda: robust.robust_type2_error([0.5] * 2, [[0, 1], [1, 2]], 0.1), "neighbours must hold only true and"),
        (lambda: robust.robust_type2_error([0.5] * 2, 2 * sparse.eye(2), 0.1), "neighbours must hold only true and"),
        (lambda: robust.robust_type2_error([0.5, 0.5], [[1, 0], [0, 0]], 0.1), "row 1 has none"),
        (lambda: robust.robust_type2_error([0.5, 0.5], np.eye(2), 1.0), "alpha must be in"),
        (lambda: robust.hamming_type2_error(0, [0.5, 0.5], 1, 0.1), "n must be a whole number"),
        (lambda: robust.hamming_type2_error(4, [0.5, 0.5], 5, 0.1), "radius must be a whole number in 0..4"),
        (lambda: robust.hamming_type2_error(4, [0.5, 0.5], 1, 0.1, edits="swaps"), "edits must be"),
        (lambda: robust.hamming_type2_error(9, np.arange(1, 41) / 820, 1, 0.1), "few distinct probabilities"),
        (lambda: robust.levenshtein_neighbours(30, 2, 1), "at most about 200000"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
