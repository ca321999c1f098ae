"""Leave-one-out bootstrap ensembles: one regressor fitted on many bootstrap samples of the training rows.

The residual of a training row uses only the models whose sample does not contain it, so it is out of sample without a
split. A new row is predicted by the average, over the training rows, of those leave-one-out aggregates.
Reference: Xu and Xie (2021), ICML, Algorithm 1 (EnbPI); Kim, Xu and Barber (2020), arXiv:2002.09025.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
from sklearn.linear_model import ElasticNet, Lasso, LinearRegression, Ridge
from sklearn.tree import DecisionTreeRegressor, ExtraTreeRegressor

from assay.conformal._arrays import Floats

Predictor = Callable[[Floats], Floats]

# Exact types only: a subclass may predict in its own way.
_LINEAR = (LinearRegression, Ridge, Lasso, ElasticNet)
_TREES = (DecisionTreeRegressor, ExtraTreeRegressor)
_FORESTS = (RandomForestRegressor, ExtraTreesRegressor)


def fit_ensemble(
    estimator: Any, X: Floats, y: Floats, n_bootstraps: int, rng: np.random.Generator
) -> tuple[list[Any], Floats, Floats]:
    """Fit the models, and aggregate them.

    Parameters
    ----------
    estimator
        A regressor; cloned, never fitted itself. Where its `random_state` is None, each clone gets its own.
    X, y
        float64, shapes (n, features) and (n,), n >= 2.
    n_bootstraps
        Bootstrap samples, at least 1. One or a few more are drawn where some row is in all of them.
    rng
        Source of every draw.

    Returns
    -------
    The models (B,), their weights in the prediction of a new row (B,), and the leave-one-out residuals (n,).
    """
    n = len(y)
    models = []
    predictions = []
    outside = []

    def add(pool: npt.NDArray[np.int64], size: int) -> None:
        drawn = rng.choice(pool, size)
        model = fit_one(estimator, X[drawn], y[drawn], rng)
        missing = np.ones(n, dtype=np.bool_)
        missing[drawn] = False
        models.append(model)
        predictions.append(np.asarray(model.predict(X), dtype=np.float64).reshape(n))
        outside.append(missing)

    for _ in range(n_bootstraps):
        add(np.arange(n), n)
    while not (seen := np.any(outside, axis=0)).all():
        # Rows in every sample have no residual yet: leave them, or if that is all of them a half, out of another one.
        pool = np.flatnonzero(seen) if seen.any() else rng.permutation(n)[: (n + 1) // 2]
        add(pool, len(pool))
    out = np.array(outside, dtype=np.float64)  # (B, n)
    shares = out / out.sum(axis=0)
    residuals = y - np.einsum("bi,bi->i", shares, np.array(predictions))
    return models, shares.mean(axis=1), residuals


def fit_one(estimator: Any, X: Floats, y: Floats, rng: np.random.Generator) -> Any:
    """A fitted clone of the estimator, seeded from the generator where it has no seed of its own."""
    model = clone(estimator)
    unseeded = {
        name: int(rng.integers(2**31))
        for name, value in sorted(model.get_params(deep=True).items())
        if (name == "random_state" or name.endswith("__random_state")) and value is None
    }
    return model.set_params(**unseeded).fit(X, y)


def weighted_predictor(models: list[Any], weights: Floats) -> Predictor:
    """A function from rows (n, features) to the weighted sum of the models' predictions (n,).

    A step of a sequence asks for one row, for which sklearn's own checks cost more than the arithmetic. Plain linear
    models and trees are therefore merged into one product or one compiled walk; all else is asked model by model.
    """
    kinds = {type(model) for model in models}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind in _LINEAR:
        return _Linear(
            weights @ np.array([np.ravel(model.coef_) for model in models]),
            float(weights @ np.array([np.ravel(model.intercept_)[0] for model in models])),
        )
    if kind in _TREES:
        return _Walk([model.tree_ for model in models], weights)
    if kind in _FORESTS:
        each = [weight / len(model.estimators_) for model, weight in zip(models, weights, strict=True)]
        sizes = [len(model.estimators_) for model in models]
        return _Walk([tree.tree_ for model in models for tree in model.estimators_], np.repeat(each, sizes))
    return _Each(models, weights)


@dataclass(frozen=True)
class _Linear:
    coefficients: Floats
    intercept: float

    def __call__(self, X: Floats) -> Floats:
        return np.asarray(X @ self.coefficients + self.intercept)


@dataclass(frozen=True)
class _Each:
    models: list[Any]
    weights: Floats

    def __call__(self, X: Floats) -> Floats:
        each = [np.asarray(model.predict(X), dtype=np.float64).reshape(len(X)) for model in self.models]
        return np.asarray(self.weights @ np.array(each))


class _Walk:
    """All trees end to end in flat arrays."""

    def __init__(self, trees: list[Any], weights: Floats) -> None:
        sizes = np.array([tree.node_count for tree in trees])
        roots = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)

        def shifted(name: str) -> npt.NDArray[np.int64]:
            """Children as places in the joined arrays; -1 stays the mark of a leaf."""
            parts = [getattr(tree, name) for tree in trees]
            return np.concatenate([np.where(one < 0, -1, one + root) for one, root in zip(parts, roots, strict=True)])

        self._arrays = (
            roots,
            shifted("children_left"),
            shifted("children_right"),
            np.concatenate([tree.feature for tree in trees]),
            np.concatenate([tree.threshold for tree in trees]),
            np.concatenate([tree.value[:, 0, 0] for tree in trees]),
            np.ascontiguousarray(weights, dtype=np.float64),
        )

    def __call__(self, X: Floats) -> Floats:
        from assay.conformal._trees_numba import predict_trees

        found: Floats = predict_trees(np.ascontiguousarray(X, dtype=np.float32), *self._arrays)
        return found
