"""Factorisations: each L C is the prefix-sum matrix, norms by brute force, and the published table of variances."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.privacy.continual import plan_counter, toeplitz, trees
from assay.privacy.continual.streams import mixed_noise
from assay.privacy.continual.toeplitz import Banded, SquareRoot, blt_weights, fit_banded, fit_blt, square_root
from assay.privacy.continual.trees import BinaryTree, Honaker, KaryTree, Plain, SmoothTree, mean_and_max_rows
from assay.privacy.noise import SeededNoise


def balanced(t: int, k: int) -> list[int]:
    digits = []
    while t:
        digit = (t + k // 2) % k - k // 2
        digits.append(digit)
        t = (t - digit) // k
    return digits


def kary_matrices(horizon: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """C and L of the k-ary tree from the definition: nodes as sets of steps, prefixes as signed sums of nodes."""
    levels = KaryTree(horizon, k).levels
    nodes: dict[tuple[int, int], int] = {}
    for level in range(levels):
        for step in range(1, horizon + 1):
            nodes.setdefault((level, (step - 1) // k**level), len(nodes))
    wanted: list[list[tuple[tuple[int, int], int]]] = []
    for t in range(1, horizon + 1):
        row, at = [], 0
        for level, digit in reversed(list(enumerate(balanced(t, k)))):
            for _ in range(abs(digit)):
                if digit > 0:
                    row.append(((level, at // k**level), 1))
                    at += k**level
                else:
                    at -= k**level
                    row.append(((level, at // k**level), -1))
        assert at == t
        wanted.append(row)
        for node, _ in row:
            nodes.setdefault(node, len(nodes))
    c, left = np.zeros((len(nodes), horizon)), np.zeros((horizon, len(nodes)))
    for (level, index), place in nodes.items():
        c[place, index * k**level : (index + 1) * k**level] = 1
    for t, row in enumerate(wanted):
        for node, sign in row:
            left[t, nodes[node]] += sign
    return c, left


@pytest.mark.parametrize(("horizon", "k"), [(1, 3), (13, 3), (40, 3), (62, 5), (100, 7), (60, 13)])
def test_kary_tree_by_its_matrices(horizon: int, k: int) -> None:
    c, left = kary_matrices(horizon, k)
    np.testing.assert_array_equal(left @ c, np.tri(horizon))
    assert c.sum(axis=0).max() <= KaryTree(horizon, k).l1
    np.testing.assert_array_equal((left**2).sum(axis=1), KaryTree(horizon, k).rows(np.arange(1, horizon + 1)))


@pytest.mark.parametrize("horizon", [1, 2, 7, 8, 9, 40])
def test_honaker_by_least_squares(horizon: int) -> None:
    """Averaging from below is the best unbiased use of the nodes inside each prefix's nodes: checked by lstsq."""
    size = 2 ** (horizon - 1).bit_length()
    levels = Honaker(horizon).levels
    variances = trees.node_variances(levels)
    for level in range(size.bit_length()):
        # All nodes under one node: rows of its subtree's C over its leaves.
        leaves = 2**level
        rows = [np.repeat(np.eye(leaves // 2**j), 2**j, axis=1) for j in range(level + 1)]
        c = np.concatenate(rows)
        answer = np.ones(leaves) @ np.linalg.pinv(c)
        assert float((answer**2).sum()) == pytest.approx(variances[level])
    assert float(Honaker(horizon).rows(np.array([horizon]))[0]) == pytest.approx(
        sum(variances[i] for i in range(levels) if horizon >> i & 1)
    )


@pytest.mark.parametrize("left_only", [True, False])
@pytest.mark.parametrize("horizon", [1, 2, 3, 8, 9, 31, 32])
def test_binary_tree_touches_no_more_nodes_than_it_says(horizon: int, left_only: bool) -> None:
    used = set()
    for t in range(1, horizon + 1):
        at = 0
        for level in reversed(range(t.bit_length())):
            if t >> level & 1:
                used.add((level, at >> level))
                at += 1 << level
    touched = max(sum((step - 1) >> level == index for level, index in used) for step in range(1, horizon + 1))
    assert touched <= BinaryTree(horizon, left_only=left_only).l1
    # The near-miss that leaves the level of the root out of the count spends more than it says.
    assert touched > BinaryTree(horizon).l1 - 1 or horizon & (horizon + 1)


@pytest.mark.parametrize("horizon", [1, 2, 5, 19, 69, 70])
def test_smooth_tree_leaves(horizon: int) -> None:
    tree = SmoothTree(horizon)
    h = tree.height
    leaves = [leaf for leaf in range(2**h) if leaf.bit_count() == h // 2][: horizon + 1]
    assert len(leaves) == horizon + 1
    for t in range(1, horizon + 1):
        covered: set[int] = set()
        for level in range(h):
            if leaves[t] >> level & 1:  # the left sibling at this level
                first = (leaves[t] >> level + 1 << level + 1) & ~((1 << level) - 1)
                covered |= set(range(first, first + 2**level))
        assert [leaf for leaf in leaves if leaf in covered] == leaves[:t]
    # A step's nodes: those of its left turns.
    assert all(h - leaf.bit_count() == tree.l1 for leaf in leaves)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([3, 5, 7, 13, 19, 21, 101]))
def test_means_and_maxima_without_the_loop(horizon: int, k: int) -> None:
    times = np.arange(1, horizon + 1)
    for design in (BinaryTree(horizon), Honaker(horizon), Plain(horizon), SmoothTree(horizon), KaryTree(horizon, k)):
        rows = design.rows(times)
        assert mean_and_max_rows(design) == pytest.approx((rows.mean(), rows.max()), rel=1e-9)


@pytest.mark.parametrize("horizon", [1, 2, 50, 300])
def test_toeplitz_filters_multiply_to_prefix_sums(horizon: int) -> None:
    root = toeplitz.square_root(horizon)
    np.testing.assert_allclose(np.convolve(root, root)[:horizon], 1.0, rtol=1e-12)
    for bands in {1, min(7, horizon), horizon}:
        banded = toeplitz.Banded(horizon, bands)
        np.testing.assert_allclose(np.convolve(banded.noise_filter(), root[:bands])[:horizon], 1.0, rtol=1e-9)
    for buffers in (1, 3):
        blt = toeplitz.fit_blt(horizon, buffers)
        poles, zeros = np.array(blt.poles), np.array(blt.zeros)
        k = np.arange(horizon)
        c = np.concatenate([[1.0], (toeplitz.blt_weights(poles, zeros)[:, None] * poles[:, None] ** k).sum(axis=0)])
        rates, weights = toeplitz.blt_noise(poles, zeros)
        filter_l = (weights[:, None] * rates[:, None] ** k).sum(axis=0)
        np.testing.assert_allclose(np.convolve(c[:horizon], filter_l)[:horizon], 1.0, rtol=1e-9)
        assert blt.l2_squared == pytest.approx(float((c[:horizon] ** 2).sum()), rel=1e-12)
        np.testing.assert_allclose(blt.rows(k + 1), np.cumsum(filter_l**2), rtol=1e-9)
        assert blt.mean_row() == pytest.approx(np.cumsum(filter_l**2).mean(), rel=1e-8)


@pytest.mark.parametrize(("horizon", "bands"), [(2, 2), (50, 1), (50, 2), (50, 7), (50, 50), (300, 20)])
def test_a_fitted_band_is_a_factorisation_and_a_minimum(horizon: int, bands: int) -> None:
    """Against dense matrices; no small step in any direction is better, and the cut square root is not."""
    fitted, cut = toeplitz.fit_banded(horizon, bands), toeplitz.Banded(horizon, bands)

    def worst(column: np.ndarray) -> float:
        c = np.zeros((horizon, horizon))
        for j, value in enumerate(column):
            c += value * np.eye(horizon, k=-j)
        noise = np.tril(np.ones((horizon, horizon))) @ np.linalg.inv(c)
        return float((c**2).sum(axis=0).max() * (noise**2).sum(axis=1).max())

    column = np.array(fitted.coefficients or (1.0,))
    value = worst(column)
    assert fitted.l2_squared * mean_and_max_rows(fitted)[1] == pytest.approx(value, rel=1e-9)
    np.testing.assert_allclose(np.convolve(fitted.noise_filter(), column)[:horizon], 1.0, rtol=1e-9)
    assert value <= cut.l2_squared * mean_and_max_rows(cut)[1] * (1 + 1e-12)
    rng = np.random.default_rng(2)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(10):
            step = np.concatenate([[0.0], rng.normal(size=bands - 1)])
            assert worst(column + size * step / np.sqrt(bands)) >= value * (1 - 1e-9)


def test_fitted_bands_at_the_published_size() -> None:
    """64 bands at T = 2^10: an independent optimiser (jax-privacy 2.0.0) found 16.8761 on average, at most 26.7389."""
    fitted = toeplitz.fit_banded(1024, 64)
    mean, worst = mean_and_max_rows(fitted)
    assert (fitted.l2_squared * mean, fitted.l2_squared * worst) == pytest.approx((16.8761, 26.7389), abs=1e-4)
    cut = toeplitz.Banded(1024, 64)
    assert cut.l2_squared * mean_and_max_rows(cut)[1] == pytest.approx(34.2124, abs=1e-4)  # the near-miss
    with pytest.raises(ValueError, match=r"at most 2\*\*28"):
        toeplitz.fit_banded(2**20, 2**10)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("fitted", [True, False])
def test_separate_contributions_cost_their_number(bands: int, fitted: bool) -> None:
    """All patterns of 3 contributions in -1, 0, 1 over 12 steps, by brute force: the squared move of C x."""
    horizon, k = 12, 3
    design = toeplitz.fit_banded(horizon, bands) if fitted else toeplitz.Banded(horizon, bands)
    c = sum(value * np.eye(horizon, k=-j) for j, value in enumerate(design._column()))

    def largest(separation: int) -> float:
        moves = [0.0]
        for places in itertools.combinations(range(horizon), k):
            if min(np.diff(places)) >= separation:
                signs = np.array(list(itertools.product((-1, 0, 1), repeat=k))).T
                moves.append(float(((c[:, places] @ signs) ** 2).sum(axis=0).max()))
        return max(moves)

    assert largest(bands) == pytest.approx(k * design.l2_squared, rel=1e-12)  # reached and not passed
    assert largest(1) <= k**2 * design.l2_squared
    if bands > 1:  # one step closer and k times is too little: the plan must not sell it
        assert largest(bands - 1) > 1.01 * k * design.l2_squared


def test_an_endless_blt_uses_the_endless_norm() -> None:
    endless = toeplitz.fit_blt(1000, 3, unbounded=True)
    finite = toeplitz.BufferedLinear(1000, endless.poles, endless.zeros)
    longer = toeplitz.BufferedLinear(10**7, endless.poles, endless.zeros)
    assert finite.l2_squared < longer.l2_squared <= endless.l2_squared
    assert longer.l2_squared == pytest.approx(endless.l2_squared, rel=1e-6)
    assert finite.l2_squared < endless.l2_squared * 0.999  # the finite norm would claim too little noise


# Section "counting" of the published comparison: mean and largest variance of a release, pure at epsilon 1, zCDP at
# rho 1/2. Closed forms, computed here from C and L alone.
EXACT = {
    2**10: {
        "plain": (1025, 2048),
        "pure tree": (1210.236328125, 2420),
        "pure Honaker": (702.2641771, 1404.2918910),
        "pure k=19": (199.4765625, 378),
        "pure best k": (170.5078125, 324),
        "tree": (55.0107421875, 110),
        "left": (50.0488758553, 100),
        "smooth": (49, 49),
        "Honaker": (31.9210989653, 63.8314504954),
        "sqrt": (9.6707932653, 10.7096106665),
        "nuclear": (8.4656813094, 8.4656813094),
    },
    2**16: {
        "plain": (65537, 131072),
        "pure tree": (4624.0088195801, 9248),
        "pure Honaker": (2544.1696544, 5088.3304892),
        "pure k=19": (950.1373291016, 1850),
        "pure best k": (614.6240234375, 1184),
        "tree": (136.0002593994, 272),
        "left": (128.0019531548, 256),
        "smooth": (100, 100),
        "Honaker": (74.8285192, 149.6567797),
        "sqrt": (19.6642921964, 21.1272996743),
        "nuclear": (17.9106494011, 17.9106494011),
    },
}
PRINTED = {
    1024: "1025 2048 1210 2420 702.3 1404 199.5 378 170.5 324 55.0 110 50.0 100 49 49 31.9 63.8 9.671 10.710 8.466 "
    "8.466",
    65536: "65537 131072 4624 9248 2544 5088 950.1 1850 614.6 1184 136.0 272 128.0 256 100 100 74.8 149.7 19.66 21.13 "
    "17.91 17.91",
}


def closed_forms(horizon: int) -> dict[str, tuple[float, float]]:
    def pure(design: trees.Factorisation) -> tuple[float, float]:
        mean, worst = mean_and_max_rows(design)
        assert design.l1 is not None
        return 2 * design.l1**2 * mean, 2 * design.l1**2 * worst

    def zcdp(design: trees.Factorisation) -> tuple[float, float]:
        mean, worst = mean_and_max_rows(design)
        return design.l2_squared * mean, design.l2_squared * worst

    tree = BinaryTree(horizon, left_only=False)
    bound = toeplitz.nuclear_bound(horizon)
    return {
        "plain": pure(Plain(horizon)),
        "pure tree": pure(tree),
        "pure Honaker": pure(Honaker(horizon)),
        "pure k=19": pure(KaryTree(horizon, 19)),
        "pure best k": pure(KaryTree(horizon, trees.best_arity(horizon))),
        "tree": zcdp(tree),
        "left": zcdp(BinaryTree(horizon - 1)),
        "smooth": zcdp(SmoothTree(horizon)),
        "Honaker": zcdp(Honaker(horizon)),
        "sqrt": zcdp(toeplitz.SquareRoot(horizon)),
        "nuclear": (bound, bound),
    }


@pytest.mark.parametrize("horizon", [2**10, 2**16])
def test_the_table_of_variances(horizon: int) -> None:
    found = closed_forms(horizon)
    for name, exact in EXACT[horizon].items():
        assert found[name] == pytest.approx(exact, rel=1e-6), name
    printed = [float(word) for word in PRINTED[horizon].split()]
    digits = [len(word.partition(".")[2]) for word in PRINTED[horizon].split()]
    values = [value for pair in found.values() for value in pair]
    for value, shown, places in zip(values, printed, digits, strict=True):
        assert abs(value - shown) <= 0.5 * 10.0**-places + 1e-9, (value, shown)


def test_best_arities() -> None:
    assert (trees.best_arity(2**10), trees.best_arity(2**16)) == (13, 21)
    # The searched one is never worse than the one that is best in the limit.
    for power in range(3, 24):
        best, limit = KaryTree(2**power, trees.best_arity(2**power)), KaryTree(2**power, 19)
        assert best.l1**2 * mean_and_max_rows(best)[1] <= limit.l1**2 * mean_and_max_rows(limit)[1]


def test_blt_comes_close_to_the_square_root() -> None:
    reference = {2**10: [14.94, 11.09, 10.74], 2**16: [57.9, 25.8, 22.06]}
    for horizon, values in reference.items():
        for buffers, value in zip((1, 2, 3), values, strict=True):
            blt = toeplitz.fit_blt(horizon, buffers)
            assert blt.l2_squared * blt.rows(np.array([horizon]))[0] <= value * 1.002
    blt = toeplitz.fit_blt(2**16, 5)
    root = toeplitz.SquareRoot(2**16)
    largest = blt.l2_squared * blt.rows(np.array([2**16]))[0]
    assert largest <= 1.005 * root.l2_squared**2
    assert largest >= toeplitz.nuclear_bound(2**16)


def test_the_nuclear_bound_by_svd() -> None:
    singular = np.linalg.svd(np.tri(60), compute_uv=False)
    assert toeplitz.nuclear_bound(60) == pytest.approx((singular.sum() / 60) ** 2)
    assert toeplitz.nuclear_bound(1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BinaryTree(0), "horizon must be"),
        (lambda: Plain(True), "horizon must be"),
        (lambda: Honaker(2**41), "horizon must be"),
        (lambda: KaryTree(10, 4), "arity must be"),
        (lambda: toeplitz.SquareRoot(2**30), "at most 2"),
        (lambda: toeplitz.Banded(10, 11), "bands must be"),
        (lambda: toeplitz.Banded(10, 2, (1.0,)), "coefficients must be 2 finite numbers"),
        (lambda: toeplitz.Banded(10, 2, (0.5, 0.1)), "the first of them 1"),
        (lambda: toeplitz.Banded(10, 2, (1.0, float("nan"))), "coefficients must be"),
        (lambda: toeplitz.fit_banded(10, 0), "bands must be"),
        (lambda: toeplitz.BufferedLinear(10, (0.5,), (0.6,)), "interlaced"),
        (lambda: toeplitz.BufferedLinear(10, (), ()), "as many"),
        (lambda: toeplitz.fit_blt(10, 11), "buffers must be"),
        (lambda: SmoothTree(5).rows(np.array([6])), "times must be"),
        (lambda: Plain(5).rows(np.array([0])), "times must be"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- rounding ---------------------------------------------------------------------------------------------------------


def toeplitz_designs(horizon: int) -> list[Any]:
    return [SquareRoot(horizon), fit_banded(horizon, 7), fit_blt(horizon, 2)]


def column_of(design: Any, horizon: int) -> list[Fraction]:
    """Coefficients of C as exact numbers."""
    if isinstance(design, SquareRoot):
        return [Fraction(float(c)) for c in square_root(horizon)]
    if isinstance(design, Banded):
        return [Fraction(c) for c in design.coefficients] + [Fraction(0)] * (horizon - design.bands)
    poles, zeros = np.array(design.poles), np.array(design.zeros)
    weights = blt_weights(poles, zeros)
    return [Fraction(1), *(Fraction(float(weights @ poles**k)) for k in range(horizon - 1))]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["square root", "banded", "BLT"])
def test_columns_can_be_rounded_so_that_no_release_is_off_by_more_than_half_a_step(which: int) -> None:
    """In exact numbers: what `Plan.numerical_delta` says of the grid. Rounding to the nearest is a near-miss."""
    horizon, grid = 48, Fraction(1, 2**7)
    design = toeplitz_designs(horizon)[which]
    column = column_of(design, horizon)
    assert sum(abs(c - b) for b, c in zip([0, *column], [*column, 0], strict=True)) <= design.variation + 1e-12
    filters = []  # L = A / C, by long division
    for t in range(horizon):
        filters.append(1 - sum((column[k] * filters[t - k] for k in range(1, t + 1)), Fraction(0)))

    def off(rounded: list[Fraction]) -> Fraction:
        sums = [sum(filters[t - k] * rounded[k] for k in range(t + 1)) for t in range(horizon)]
        return max(abs(total - 1) for total in sums)  # a step of 1 at time 0 adds 1 to every release

    fed_back: list[Fraction] = []
    for t in range(horizon):
        rest = 1 - sum((filters[t - k] * fed_back[k] for k in range(t)), Fraction(0))
        fed_back.append(round(rest / grid) * grid)
    assert off(fed_back) <= grid / 2
    away = math.sqrt(sum(float(a - b) ** 2 for a, b in zip(fed_back, column, strict=True)))
    assert away <= math.sqrt(horizon) * design.variation * float(grid) / 2
    assert off([round(c / grid) * grid for c in column]) > grid / 2


def test_mixing_is_as_exact_as_the_plan_says() -> None:
    """L z in whole numbers at some times, against what is rounded to integers; doubles are the near-miss."""
    plan = plan_counter(2**12, rho=Fraction(1, 2), mechanism="square root", adjacency="add-remove", unit="event")
    mixed = mixed_noise(plan, SeededNoise(5))
    draws = np.asarray(SeededNoise(5).gaussian(plan.node, plan.design.horizon)).tolist()
    weights = [int(w * 2.0**80) for w in plan.design.noise_filter().tolist()]
    error = []
    for t in (0, 1, 77, 1000, 2**12 - 1):
        exact = Fraction(sum(weights[t - k] * draws[k] for k in range(t + 1)), 2**80 * 2**plan.grid_bits)
        mantissa, exponent = np.frexp(mixed[t])
        found = Fraction(int(mantissa * np.longdouble(2.0**70)), 1) * Fraction(2) ** (int(exponent) - 70)
        error.append(abs(float(found - exact)))
    allowed = plan.numerical_delta / (2 * plan.design.horizon) - 2.0 ** -(plan.grid_bits + 1)
    assert max(error) <= allowed
    if np.finfo(np.longdouble).eps < 1e-18:
        from scipy.fft import irfft, rfft

        size = 2**13
        doubles = irfft(
            rfft(np.array(draws) * 2.0**-plan.grid_bits, size) * rfft(plan.design.noise_filter(), size), size
        )
        assert np.abs(doubles[: 2**12] - mixed).max() > allowed
