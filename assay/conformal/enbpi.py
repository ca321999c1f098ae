"""EnbPI: intervals from the empirical quantiles of the latest residuals of a leave-one-out bootstrap ensemble.

Guarantee: asymptotic, for residuals that are nearly stationary and strongly mixing; none given the recent past.
Source: Xu and Xie (2021), Conformal Prediction Interval for Dynamic Time-Series, ICML, PMLR 139, arXiv:2010.09107.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from assay.conformal._arrays import Floats
from assay.conformal._sequence import SequenceIntervals, attainable, check_integer
from assay.conformal.spci import beta_levels, shortest


class EnbPI(SequenceIntervals):
    """Ensemble batch prediction intervals: quantiles of the last `window` signed residuals.

    Parameters
    ----------
    estimator, n_bootstraps, alpha, horizon, n_betas, random_state
        As in `SPCI`.
    window
        Residuals whose quantiles are taken, at least 1; None for as many as there are training rows.

    Notes
    -----
    The quantile at level q is the smallest residual with at least the share q at or below it. The published code
    rounds levels up to whole percents; this one does not.
    """

    def __init__(
        self,
        estimator: Any = None,
        n_bootstraps: int = 25,
        window: int | None = 100,
        alpha: float | npt.ArrayLike = 0.1,
        *,
        horizon: int = 1,
        n_betas: int = 5,
        random_state: int | np.random.Generator | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.n_bootstraps = n_bootstraps
        self.window = window
        self.alpha = alpha
        self.horizon = horizon
        self.n_betas = n_betas
        self.random_state = random_state

    def _check_parameters(self) -> None:
        check_integer(self.n_bootstraps, "n_bootstraps", 1)
        check_integer(self.horizon, "horizon", 1)
        check_integer(self.n_betas, "n_betas", 1)
        if self.n_betas % 2 == 0:
            raise ValueError(f"n_betas must be odd, so that alpha / 2 is among them, got {self.n_betas}.")
        if self.window is not None:
            check_integer(self.window, "window", 1)
            least = max(attainable(alpha) for alpha in self._alphas)
            if self.window < least:
                raise ValueError(f"window must be at least {least} for alpha={self.alpha!r}, got {self.window}.")

    def _horizon(self) -> int:
        return self.horizon

    def _start(self, residuals: Floats, rng: np.random.Generator) -> None:
        least = max(self._needed(alpha) for alpha in self._alphas)
        self._keep = max(residuals.shape[1], least) if self.window is None else self.window + self.horizon - 1
        self._residuals = residuals[:, -self._keep :]
        self._levels = beta_levels(self._alphas, self.n_betas)

    def _observe(self, residuals: Floats) -> None:
        self._residuals = np.concatenate([self._residuals, residuals[:, None]], axis=1)[:, -self._keep :]

    def _offsets(self, lead: int) -> Floats:
        last = self._residuals[lead, -(self._keep if self.window is None else self.window) :]
        scores = np.sort(last[~np.isnan(last)])
        finite = np.array([len(scores) >= attainable(alpha) for alpha in self._alphas])
        infinite = np.array([[-np.inf], [np.inf]]) * np.ones(len(self._alphas))
        if not finite.any():
            return infinite
        ranks = np.ceil(self._levels * len(scores) - 1e-9).astype(np.int64) - 1
        return np.where(finite, shortest(scores[np.clip(ranks, 0, len(scores) - 1)]), infinite)

    def _needed(self, alpha: float) -> int:
        return self.horizon - 1 + attainable(alpha)

    def _available(self) -> int:
        return int(self._residuals.shape[1])
