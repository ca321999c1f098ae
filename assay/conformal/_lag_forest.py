"""Quantile regression forests on the lags of one series, as SPCI needs them: many rows, one query at a time.

Weights are Meinshausen's: a row counts in a tree by how often it was drawn into the query's leaf, divided by the leaf's
draws, averaged over trees. Two engines: `HistogramForest` bins the series once and searches splits by histogram;
`ExactForest` is the package quantile-forest.
Reference: Meinshausen (2006), Quantile Regression Forests, JMLR 7, 983-999.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from assay._errors import MissingDependencyError
from assay.conformal._arrays import Floats

# Cumulated weights carry rounding errors of about 1e-16 per row; a level that they reach up to this counts as reached.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class ForestSettings:
    """Shape of the forest: trees, depth, fewest draws in a leaf, and bins of the histogram engine."""

    trees: int = 10
    depth: int = 2
    min_leaf: int = 1
    bins: int = 32


class LagForest(Protocol):
    """A forest that is fitted; `quantiles` answers one query."""

    def quantiles(self, query: Floats, levels: Floats) -> Floats:
        """Quantiles of the target at `levels`, given the lags `query` (lags,)."""


class HistogramForest:
    """Forest on a series cut into quantile bins; with `whole=False` only the path of each query is grown.

    Parameters
    ----------
    history
        float64, shape (n,): the series. Row i of the lag matrix is history[i : i + lags].
    targets
        float64, shape (rows,), rows <= n - lags + 1: what row i foretells.
    lags
        Columns of the lag matrix.
    settings
        Shape of the forest.
    seed
        Seed of the bootstrap draws, in [0, 2**64).
    whole
        Grow whole trees now, for many queries; otherwise a path per query. The answers are the same.
    """

    def __init__(
        self, history: Floats, targets: Floats, lags: int, settings: ForestSettings, seed: int, *, whole: bool
    ) -> None:
        from assay.conformal import _lag_forest_numba as compiled

        rows = len(targets)
        used = history[: rows + lags - 1]
        inner = np.arange(1, settings.bins) / settings.bins
        ordered = np.sort(used)
        # Edges are values of the series, so that "code <= c" and "value <= edge c" are the same.
        self._edges = np.unique(ordered[np.ceil(inner * len(used)).astype(np.int64) - 1])
        self._codes = self._code(used)
        self._order = np.argsort(targets)
        self._sorted_targets = targets[self._order]
        # Centred: the search compares squares of sums, in which a large mean would drown the differences.
        centred = targets - targets.mean()
        centred = centred / binary_scale(centred)
        shape = (settings.trees, settings.depth, settings.min_leaf, np.uint64(seed))
        self._arguments = (lags, len(self._edges) + 1, centred, *shape)
        self._trees = compiled.grow(self._codes, *self._arguments) if whole else None

    def _code(self, values: Floats) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._edges, values).astype(np.int64)

    def weights(self, query: Floats) -> Floats:
        """float64, shape (rows,): weight of each row for the lags `query` (lags,); they sum to one."""
        from assay.conformal import _lag_forest_numba as compiled

        codes = self._code(query)
        if self._trees is not None:
            found: Floats = compiled.tree_weights(*self._trees, codes)
        else:
            found = compiled.path_weights(self._codes, codes, *self._arguments)
        return found

    def quantiles(self, query: Floats, levels: Floats) -> Floats:
        """Smallest targets whose cumulated weight reaches each level; level 0 is the smallest with any weight."""
        return weighted_quantiles(self._sorted_targets, self.weights(query)[self._order], levels)


class ExactForest:
    """Forest of the package quantile-forest: every threshold is tried. The reference, some 200 times slower."""

    def __init__(self, history: Floats, targets: Floats, lags: int, settings: ForestSettings, seed: int) -> None:
        try:
            from quantile_forest import RandomForestQuantileRegressor
        except ImportError:
            raise MissingDependencyError(
                'engine="exact" needs the package quantile-forest: pip install quantile-forest, or use '
                'engine="histogram".'
            ) from None
        # Trees compare features in float32.
        self._scale = binary_scale(history)
        rows = np.lib.stride_tricks.sliding_window_view(history / self._scale, lags)[: len(targets)]
        self._forest = RandomForestQuantileRegressor(
            n_estimators=settings.trees,
            max_depth=settings.depth,
            min_samples_leaf=settings.min_leaf,
            # The package's default keeps one random row per leaf, which is no quantile of the leaf.
            max_samples_leaf=None,
            random_state=seed % 2**32,
        ).fit(rows, targets / self._scale)

    def quantiles(self, query: Floats, levels: Floats) -> Floats:
        """Quantiles of the weighted targets at `levels`, interpolated between neighbours."""
        # The package takes levels strictly inside (0, 1).
        inside = np.clip(levels, _ROUNDING, 1 - _ROUNDING).tolist()
        found = self._forest.predict(query[None, :] / self._scale, quantiles=inside, weighted_leaves=True)
        return np.asarray(found, dtype=np.float64).reshape(len(levels)) * self._scale


def binary_scale(values: Floats) -> float:
    """The largest power of two not above the largest size; 1 where all values are 0.

    Dividing by it rounds nothing, and squares of what is left neither overflow nor vanish.
    """
    largest = float(np.abs(values).max(initial=0.0))
    # Below the smallest normal number a reciprocal would be infinite.
    return max(math.ldexp(1.0, math.frexp(largest)[1] - 1), 2.0**-1022) if largest else 1.0


def weighted_quantiles(values: Floats, weights: Floats, levels: Floats) -> Floats:
    """Smallest of the sorted `values` whose cumulated weight reaches each level; values of weight 0 do not count."""
    counting = weights > 0
    values, weights = values[counting], weights[counting]
    places = np.searchsorted(np.cumsum(weights), levels - _ROUNDING)
    found: Floats = values[np.minimum(places, len(values) - 1)]
    return found
