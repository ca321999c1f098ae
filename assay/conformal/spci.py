"""SPCI: intervals from the quantiles of the next residual given the last ones, by a quantile regression forest.

Guarantee: asymptotic. Where the forest's conditional quantiles are consistent, coverage given the past tends to
1 - alpha; there is no finite-sample guarantee, and docs/explanation/conformal-sequences.md shows what to expect.
Source: Xu and Xie (2023), Sequential Predictive Conformal Inference for Time Series, ICML, PMLR 202, arXiv:2212.03463.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from assay.conformal._arrays import Floats
from assay.conformal._lag_forest import ExactForest, ForestSettings, HistogramForest, LagForest
from assay.conformal._sequence import SequenceIntervals, attainable, check_integer


class SPCI(SequenceIntervals):
    """Sequential predictive conformal inference.

    A leave-one-out bootstrap ensemble gives point forecasts and out-of-sample residuals. At every step a quantile
    regression forest learns the next residual from the `window` residuals before it, over the last n residuals (n: the
    training rows), and is asked at the latest window. Of several pairs of quantiles (beta, 1 - alpha + beta) the one
    with the shortest interval is taken.

    Parameters
    ----------
    estimator
        A regressor in the manner of scikit-learn; cloned for each bootstrap sample. Default `LinearRegression()`.
    n_bootstraps
        Bootstrap samples, and models, at least 1.
    window
        Residuals that the forest sees: the lags, at least 1.
    alpha
        Miscoverage level in (0, 1), or several at once.
    horizon
        Steps ahead, at least 1. Row k of a call of `predict` is forecast from the features of row 0 by an ensemble of
        its own, and its interval by a forest whose target lies k steps after the window: no recursion.
    n_betas
        Odd number of values of beta, equally spaced on [0, alpha]; 1 stands for alpha / 2, the symmetric interval.
    engine
        "histogram": residuals cut into `n_bins` quantile bins, compiled; one step in about a millisecond.
        "exact": the package quantile-forest, which tries every threshold.
    refit_every
        Rows after which the forest is grown anew; in between the old one answers the new windows.
    n_trees, max_depth, min_samples_leaf, n_bins
        Shape of the forest. The published method has 10 trees of depth 2.
    random_state
        Generator from which every draw is taken (bootstrap samples, base models without a seed of their own, forests),
        or a seed; None takes fresh entropy.

    Notes
    -----
    Differences from the published code, on purpose: with a horizon above 1 it chooses beta at a window that ends
    horizon - 1 steps early, here beta belongs to the window in use; a row that every bootstrap sample contains gets
    an extra model instead of an in-sample residual; each lead has its own residuals, while the window always holds
    those of lead 0, the freshest there are.

    The interval is infinite, with a `ShortCalibrationWarning`, until there are window + lead + (1 - alpha) / alpha
    residuals. Intervals of several levels need not be nested, as each picks its own beta.

    `predict` costs O(n_trees max_depth n window), some 1 ms at n = 2000 and window 100.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(7)
    >>> x = rng.normal(size=(400, 1))
    >>> y = x[:, 0] + np.convolve(rng.normal(size=409), np.ones(10), "valid")
    >>> model = SPCI(window=20, alpha=0.1, random_state=rng).fit(x[:300], y[:300])
    >>> point, intervals = model.predict(x[300:301])
    >>> intervals.shape
    (1, 2, 1)
    >>> model = model.update(x[300:301], y[300:301])
    """

    def __init__(
        self,
        estimator: Any = None,
        n_bootstraps: int = 25,
        window: int = 100,
        alpha: float | npt.ArrayLike = 0.1,
        *,
        horizon: int = 1,
        n_betas: int = 5,
        engine: Literal["histogram", "exact"] = "histogram",
        refit_every: int = 1,
        n_trees: int = 10,
        max_depth: int = 2,
        min_samples_leaf: int = 1,
        n_bins: int = 32,
        random_state: int | np.random.Generator | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.n_bootstraps = n_bootstraps
        self.window = window
        self.alpha = alpha
        self.horizon = horizon
        self.n_betas = n_betas
        self.engine = engine
        self.refit_every = refit_every
        self.n_trees = n_trees
        self.max_depth = max_depth
        self.min_samples_leaf = min_samples_leaf
        self.n_bins = n_bins
        self.random_state = random_state

    def _check_parameters(self) -> None:
        for name, least in (
            ("n_bootstraps", 1),
            ("window", 1),
            ("horizon", 1),
            ("n_betas", 1),
            ("refit_every", 1),
            ("n_trees", 1),
            ("max_depth", 1),
            ("min_samples_leaf", 1),
            ("n_bins", 2),
        ):
            check_integer(getattr(self, name), name, least)
        if self.n_betas % 2 == 0:
            raise ValueError(f"n_betas must be odd, so that alpha / 2 is among them, got {self.n_betas}.")
        if self.max_depth > 12:
            raise ValueError(f"max_depth must be at most 12, got {self.max_depth}.")
        if self.engine not in ("histogram", "exact"):
            raise ValueError(f'engine must be "histogram" or "exact", got {self.engine!r}.')

    def _horizon(self) -> int:
        return self.horizon

    def _start(self, residuals: Floats, rng: np.random.Generator) -> None:
        self._residuals = residuals
        # As many as there were to train on, and never fewer than the intervals need.
        self._keep = max(residuals.shape[1], max(self._needed(alpha) for alpha in self._alphas))
        self._forest_seed = int(rng.integers(2**62))
        self._levels = beta_levels(self._alphas, self.n_betas)
        self._settings = ForestSettings(
            trees=self.n_trees, depth=self.max_depth, min_leaf=self.min_samples_leaf, bins=self.n_bins
        )
        self._seen = 0
        self._forest_age = -1
        self._settle()

    def _observe(self, residuals: Floats) -> None:
        self._residuals = np.concatenate([self._residuals, residuals[:, None]], axis=1)[:, -self._keep :]
        self._seen += 1
        if self._seen % self.refit_every == 0:
            self._at_refit = self._residuals

    def _settle(self) -> None:
        age = self._seen // self.refit_every
        if self.refit_every > 1 and age != self._forest_age:
            if self._seen == 0:
                self._at_refit = self._residuals
            self._forest_age = age
            self._forests = [self._forest(lead, self._at_refit) for lead in range(self.horizon)]

    def _forest(self, lead: int, residuals: Floats) -> LagForest | None:
        """The forest for one lead, or None while it has no row to learn from."""
        history, targets = residuals[0], residuals[lead, self.window + lead :]
        if len(targets) < 1:
            return None
        # Consecutive seeds: both engines mix them before use.
        seed = self._forest_seed + (self._seen // self.refit_every) * self.horizon + lead
        if self.engine == "exact":
            return ExactForest(history, targets, self.window, self._settings, seed)
        return HistogramForest(history, targets, self.window, self._settings, seed, whole=self.refit_every > 1)

    def _offsets(self, lead: int) -> Floats:
        infinite = np.array([[-np.inf], [np.inf]]) * np.ones(len(self._alphas))
        rows = self._residuals.shape[1] - self.window - lead
        finite = np.array([rows >= attainable(alpha) for alpha in self._alphas])
        if not finite.any():
            return infinite
        forest = self._forest(lead, self._residuals) if self.refit_every == 1 else self._forests[lead]
        if forest is None:
            return infinite
        quantiles = forest.quantiles(self._residuals[0, -self.window :], self._levels.ravel())
        return np.where(finite, shortest(quantiles.reshape(self._levels.shape)), infinite)

    def _needed(self, alpha: float) -> int:
        return self.window + self.horizon - 1 + attainable(alpha)

    def _available(self) -> int:
        return int(self._residuals.shape[1])


def beta_levels(alphas: Floats, n_betas: int) -> Floats:
    """Levels (2, n_betas, alphas) of the lower and upper quantiles: beta and 1 - alpha + beta."""
    shares = np.linspace(0, 1, n_betas) if n_betas > 1 else np.array([0.5])
    betas = shares[:, None] * alphas
    return np.array([betas, 1 - alphas + betas])


def shortest(quantiles: Floats) -> Floats:
    """Of the pairs of quantiles (2, n_betas, alphas) the closest for each level, (2, alphas)."""
    best = np.argmin(quantiles[1] - quantiles[0], axis=0)
    return quantiles[:, best, np.arange(quantiles.shape[2])]
