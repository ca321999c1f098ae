"""The compiled forest on lags: paths equal trees, trees equal scikit-learn's on the bins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.tree import DecisionTreeRegressor

from assay._errors import MissingDependencyError
from assay.conformal import _lag_forest_numba as compiled
from assay.conformal._lag_forest import ExactForest, ForestSettings, HistogramForest, weighted_quantiles


def autoregressive(n: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=n)
    for i in range(1, n):
        noise[i] += 0.8 * noise[i - 1]
    return noise


def rows_of(series: np.ndarray, lags: int, lead: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lag matrix and targets, built the slow way."""
    places = range(lags, len(series) - lead)
    return np.array([series[i - lags : i] for i in places]), np.array([series[i + lead] for i in places])


@given(st.integers(3, 12), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**64 - 1), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_a_path_is_the_tree_seen_by_one_query(lags: int, depth: int, lead: int, seed: int, leaf: int) -> None:
    series = autoregressive(60, seed % 1000)
    shape = ForestSettings(trees=4, depth=depth, min_leaf=leaf, bins=8)
    targets = series[lags + lead :]
    path = HistogramForest(series, targets, lags, shape, seed, whole=False)
    whole = HistogramForest(series, targets, lags, shape, seed, whole=True)
    for start in (0, 17, len(series) - lags):
        query = series[start : start + lags]
        np.testing.assert_array_equal(path.weights(query), whole.weights(query))
        assert path.weights(query).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("lead", [0, 2])
def test_a_tree_is_scikit_learns_on_the_bins(lead: int) -> None:
    """Same bootstrap, same bins: each row's leaf must be the one of DecisionTreeRegressor, in 40 series.

    Leaves of at least 10 draws make ties between splits improbable. Near-miss: the rows read backwards.
    """
    lags, shape, backwards = 7, ForestSettings(trees=1, depth=2, bins=16, min_leaf=10), 0
    for seed in range(40):
        series = autoregressive(300, seed)
        targets = series[lags + lead :]
        forest = HistogramForest(series, targets, lags, shape, seed, whole=False)
        drawn = np.empty(len(targets))
        compiled.bootstrap(len(targets), np.uint64(seed), 0, drawn)
        assert drawn.sum() == len(targets)
        codes = np.searchsorted(forest._edges, series)
        rows, expected = rows_of(series, lags, lead)
        matrix = rows_of(codes.astype(float), lags, lead)[0]
        np.testing.assert_array_equal(targets, expected)
        share = (10 - 1e-6) / len(targets)
        tree = DecisionTreeRegressor(max_depth=2, min_weight_fraction_leaf=share, random_state=0)
        leaves = tree.fit(matrix, targets, sample_weight=drawn).apply(matrix)
        # Rows that were drawn: scikit-learn puts a threshold in the middle of a gap between them.
        for row in np.flatnonzero(drawn)[::40]:
            inside = np.where(leaves == leaves[row], drawn, 0)
            np.testing.assert_allclose(forest.weights(rows[row]), inside / inside.sum(), atol=1e-12)
            backwards += not np.allclose(forest.weights(rows[row][::-1].copy()), inside / inside.sum())
    assert backwards > 10


def test_the_bootstrap_is_uniform() -> None:
    """200 samples of 50 rows: chi-square of 10,000 draws over 50 cells, false alarm 1e-6. Near-miss: one seed."""
    from scipy.stats import chi2

    total, one = np.zeros(50), np.empty(50)
    for tree in range(200):
        compiled.bootstrap(50, np.uint64(9), tree, one)
        total += one
    statistic = ((total - 200) ** 2 / 200).sum()
    assert statistic < chi2.isf(1e-6, 49)
    assert 200 * ((one - 1) ** 2).sum() > chi2.isf(1e-6, 49)  # the same sample 200 times over


@pytest.mark.parametrize("series", [autoregressive(500, 3), np.abs(autoregressive(500, 4)) ** 2])
def test_engines_agree_within_seed_noise(series: np.ndarray) -> None:
    """Mean quantiles over 12 seeds each: engines differ by less than 5 standard errors plus a tenth of the spread.

    The tenth allows for bins in place of all thresholds. Near-miss: the forest of the reversed series differs by more.
    """
    lags, levels = 20, np.array([0.05, 0.5, 0.95])
    targets, query = series[lags:], series[-lags:].copy()
    shape = ForestSettings()

    def quantiles(kind: str, data: np.ndarray, goal: np.ndarray) -> np.ndarray:
        found = []
        for seed in range(12):
            if kind == "exact":
                found.append(ExactForest(data, goal, lags, shape, seed).quantiles(query, levels))
            else:
                found.append(HistogramForest(data, goal, lags, shape, seed, whole=False).quantiles(query, levels))
        return np.array(found)

    exact, ours = quantiles("exact", series, targets), quantiles("histogram", series, targets)
    error = np.sqrt((exact.var(axis=0, ddof=1) + ours.var(axis=0, ddof=1)) / 12)
    allowed = 5 * error + 0.1 * targets.std()
    assert (np.abs(exact.mean(axis=0) - ours.mean(axis=0)) < allowed).all()
    other = quantiles("histogram", series, np.roll(targets, 100))
    assert not (np.abs(exact.mean(axis=0) - other.mean(axis=0)) < allowed).all()


def test_constant_series_and_single_rows() -> None:
    flat = HistogramForest(np.ones(30), np.ones(25), 5, ForestSettings(), 1, whole=True)
    np.testing.assert_array_equal(flat.quantiles(np.ones(5), np.array([0.0, 0.5, 1.0])), 1)
    single = HistogramForest(np.arange(6.0), np.array([5.0]), 5, ForestSettings(), 1, whole=False)
    np.testing.assert_array_equal(single.quantiles(np.arange(5.0), np.array([0.0, 1.0])), 5)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=12).filter(
        lambda pairs: any(w for _, w in pairs)
    ),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_weighted_quantiles_are_their_definition(pairs: list[tuple[float, int]], level: float) -> None:
    pairs = sorted(pairs)
    values, counts = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs], dtype=float)
    listed = np.sort(np.repeat(values, counts.astype(int)))
    found = weighted_quantiles(values, counts / counts.sum(), np.array([level]))[0]

    def smallest(needed: float) -> float:
        return next((v for v in listed if (listed <= v).sum() >= needed), listed[-1])

    # The smallest value with at least the share `level` at or below it; a level that is met up to rounding is met.
    assert found in (smallest(level * len(listed) - 1e-7), smallest(level * len(listed) + 1e-7))


def test_the_exact_engine_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "quantile_forest", None)
    with pytest.raises(MissingDependencyError, match="pip install quantile-forest"):
        ExactForest(np.arange(9.0), np.arange(4.0), 5, ForestSettings(), 0)
