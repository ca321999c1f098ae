"""Adaptive conformal inference: the level itself is steered by the misses. One step size (ACI), or several (DtACI).

Guarantee of ACI: over any T steps and for any data the share of misses is within (max(a, 1 - a) + g) / (g T) of
alpha, a: first level, g: step size. DtACI tunes the step size online, with a bound on its regret.
Source: Gibbs and Candes (2021), NeurIPS, arXiv:2106.00170, Proposition 4.1; (2024), JMLR 25(162), arXiv:2208.08401.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.conformal._arrays import Floats
from assay.conformal._sequence import SequenceIntervals, check_integer, check_real, upper_quantile


class _Adaptive(SequenceIntervals):
    """Symmetric intervals from the absolute residuals of the last `window` rows at a level that moves."""

    window: int | None

    def _check_parameters(self) -> None:
        check_integer(self.n_bootstraps, "n_bootstraps", 1)
        if self.window is not None:
            check_integer(self.window, "window", 1)

    def _start(self, residuals: Floats, rng: np.random.Generator) -> None:
        least = max(self._needed(alpha) for alpha in self._alphas)
        self._keep = self.window or max(residuals.shape[1], least)
        self._scores = np.abs(residuals[0, -self._keep :])
        self._sorted = np.sort(self._scores)
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Set the first levels."""

    @abstractmethod
    def _levels_now(self) -> Floats:
        """The level in use for each alpha, (alphas,); may lie outside [0, 1]."""

    @abstractmethod
    def _learn(self, score: float) -> None:
        """Move the levels after one score; `_sorted` still holds the scores from before it."""

    def _observe(self, residuals: Floats) -> None:
        score = abs(float(residuals[0]))
        self._learn(score)
        self._scores = np.append(self._scores, score)[-self._keep :]
        self._sorted = np.sort(self._scores)

    def _offsets(self, lead: int) -> Floats:
        # A level of 1 or more means the empty set; an interval cannot be empty, so it shrinks to the point.
        ends = np.array([max(0.0, upper_quantile(self._sorted, level)) for level in self._levels_now()])
        return np.array([-ends, ends])

    def _available(self) -> int:
        return len(self._scores)


class ACI(_Adaptive):
    """Adaptive conformal inference with one step size.

    Parameters
    ----------
    estimator, n_bootstraps, alpha, random_state
        As in `SPCI`.
    window
        Latest residuals whose quantile is taken; None for as many as there are training rows.
    gamma
        Step size, > 0: the level rises by gamma alpha after a hit and falls by gamma (1 - alpha) after a miss.

    Notes
    -----
    The level is not clipped, as the guarantee needs: at 0 or below the interval is infinite until a hit, and at 1 or
    above it is the point forecast alone.
    """

    def __init__(
        self,
        estimator: Any = None,
        n_bootstraps: int = 25,
        window: int | None = None,
        alpha: float | npt.ArrayLike = 0.1,
        *,
        gamma: float = 0.005,
        random_state: int | np.random.Generator | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.n_bootstraps = n_bootstraps
        self.window = window
        self.alpha = alpha
        self.gamma = gamma
        self.random_state = random_state

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_real(self.gamma, "gamma", above=0)

    def _begin(self) -> None:
        self._level = self._alphas.copy()

    def _levels_now(self) -> Floats:
        return self._level

    def _learn(self, score: float) -> None:
        missed = np.array([score > upper_quantile(self._sorted, level) for level in self._level])
        self._level = self._level + self.gamma * (self._alphas - missed)


class DtACI(_Adaptive):
    """Adaptive conformal inference that tunes its step size: experts of several step sizes, weighted by their loss.

    Parameters
    ----------
    estimator, n_bootstraps, window, alpha, random_state
        As in `ACI`.
    gammas
        Step sizes of the experts, each > 0.
    interval
        Steps over which it should be nearly as good as the best expert, at least 1. It sets the learning rate
        eta = sqrt((log(K interval) + 2) / (interval E)), E = ((1 - a)^2 a^3 + a^2 (1 - a)^3) / 3 at level a, for K
        experts, and the share 1 / (2 interval) of the weight that is spread evenly at each step.

    Notes
    -----
    The level in use is the experts' weighted mean, so nothing is drawn at random. An expert's loss is the pinball loss
    of its level against beta_t, the largest level whose interval would have held the truth. As in `ACI` no level is
    clipped: where the mean is at 0 or below, after misses close together, the interval is infinite for that row.
    """

    def __init__(
        self,
        estimator: Any = None,
        n_bootstraps: int = 25,
        window: int | None = None,
        alpha: float | npt.ArrayLike = 0.1,
        *,
        gammas: Sequence[float] = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128),
        interval: int = 100,
        random_state: int | np.random.Generator | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.n_bootstraps = n_bootstraps
        self.window = window
        self.alpha = alpha
        self.gammas = gammas
        self.interval = interval
        self.random_state = random_state

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_integer(self.interval, "interval", 1)
        steps = np.asarray(self.gammas, dtype=np.float64)
        if steps.ndim != 1 or not len(steps) or not ((steps > 0) & np.isfinite(steps)).all():
            raise ValueError(f"gammas must be positive numbers, at least one, got {self.gammas!r}.")

    def _begin(self) -> None:
        self._steps = np.asarray(self.gammas, dtype=np.float64)
        a, k = self._alphas, len(self._steps)
        moment = ((1 - a) ** 2 * a**3 + a**2 * (1 - a) ** 3) / 3
        self._eta = np.sqrt((math.log(k * self.interval) + 2) / (self.interval * moment))
        self._experts = np.repeat(self._alphas[:, None], k, axis=1)  # (alphas, K)
        self._weights = np.full_like(self._experts, 1 / k)

    def _levels_now(self) -> Floats:
        return np.asarray((self._weights * self._experts).sum(axis=1))

    def _learn(self, score: float) -> None:
        m = len(self._sorted)
        # The truth is held at level a while ceil((m + 1)(1 - a)) exceeds the number of smaller scores.
        beta = 1 - np.searchsorted(self._sorted, score) / (m + 1)
        gap = beta - self._experts
        loss = self._alphas[:, None] * gap - np.minimum(0, gap)
        weights = self._weights * np.exp(-self._eta[:, None] * loss)
        weights /= weights.sum(axis=1, keepdims=True)
        share = 1 / (2 * self.interval)
        self._weights = (1 - share) * weights + share / len(self._steps)
        self._experts = self._experts + self._steps * (self._alphas[:, None] - (gap <= 0))
