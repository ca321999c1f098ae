"""Conformal PID control: the half-width is steered by the misses (P), their sum (I), and a forecast of the scores (D).

Guarantee: with the error integrator and bounded scores the long-run share of misses tends to alpha for any data.
Source: Angelopoulos, Candes and Tibshirani (2023), NeurIPS, arXiv:2307.16895, Theorem 1 and section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.conformal._arrays import Floats
from assay.conformal._lag_forest import binary_scale
from assay.conformal._sequence import SequenceIntervals, check_integer, check_real, upper_quantile

Scorecaster = Callable[[Floats], tuple[Floats, float]]


class ConformalPID(SequenceIntervals):
    """Symmetric intervals whose half-width is q_t = track_t + integral_t + forecast_t.

    Parameters
    ----------
    estimator, n_bootstraps, alpha, random_state
        As in `SPCI`. The scores are the absolute residuals.
    learning_rate
        P: the tracked quantile moves by learning_rate B_t (miss - alpha), B_t the largest score of the last `window`.
    window
        Scores that set the scale B_t, and that the scorecaster sees; at least 1.
    integral_gain
        K_I of the integrator K_I tan(x log(t + 1) / (C (t + 1))), x the sum of miss - alpha; None for the largest score
        of training; 0 switches it off.
    saturation
        C > 0 of the integrator; None for (2 / pi) (ceil(0.01 log T) - 1 / log T) with T the training rows, at least 8.
    scorecaster
        D: "autoregressive" for `autoregressive_scorecast`, None for none, or a function from the last scores (n,) to
        fitted values (n,) and a forecast of the next.

    Notes
    -----
    Where the argument of the tangent leaves (-pi/2, pi/2) the interval is infinite, or the point forecast alone: that
    is what bounds the sum of misses. A half-width below 0 counts as the empty set and is shown as the point.
    """

    def __init__(
        self,
        estimator: Any = None,
        n_bootstraps: int = 25,
        alpha: float | npt.ArrayLike = 0.1,
        *,
        learning_rate: float = 0.1,
        window: int = 100,
        integral_gain: float | None = None,
        saturation: float | None = None,
        scorecaster: Scorecaster | str | None = "autoregressive",
        random_state: int | np.random.Generator | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.n_bootstraps = n_bootstraps
        self.alpha = alpha
        self.learning_rate = learning_rate
        self.window = window
        self.integral_gain = integral_gain
        self.saturation = saturation
        self.scorecaster = scorecaster
        self.random_state = random_state

    def _check_parameters(self) -> None:
        check_integer(self.n_bootstraps, "n_bootstraps", 1)
        check_integer(self.window, "window", 1)
        check_real(self.learning_rate, "learning_rate", above=0)
        if self.integral_gain is not None and self.integral_gain != 0:
            check_real(self.integral_gain, "integral_gain", above=0)
        if self.saturation is not None:
            check_real(self.saturation, "saturation", above=0)
        if not (self.scorecaster in (None, "autoregressive") or callable(self.scorecaster)):
            raise ValueError(f'scorecaster must be None, "autoregressive" or a function, got {self.scorecaster!r}.')

    def _start(self, residuals: Floats, rng: np.random.Generator) -> None:
        scores = np.abs(residuals[0])
        self._count = len(scores)
        self._scores = scores[-self.window :]
        fitted, self._forecast = self._scorecast()
        left = np.sort(self._scores - fitted)
        self._track = np.array([upper_quantile(left, alpha) for alpha in self._alphas])
        # Too few scores for the level: begin with the largest, and let the tracker correct it.
        self._track = np.where(np.isinf(self._track), left[-1], self._track)
        self._misses = np.zeros(len(self._alphas))  # sums of miss - alpha
        self._steps = 0
        self._gain = float(scores.max()) if self.integral_gain is None else float(self.integral_gain)
        span = math.log(max(len(scores), 8))
        default = 2 / math.pi * (math.ceil(0.01 * span) - 1 / span)
        self._saturation = default if self.saturation is None else float(self.saturation)

    def _scorecast(self) -> tuple[Floats, float]:
        if self.scorecaster is None:
            return np.zeros(len(self._scores)), 0.0
        cast = autoregressive_scorecast if self.scorecaster == "autoregressive" else self.scorecaster
        fitted, following = cast(self._scores)  # type: ignore[operator]
        return fitted, float(following)

    def _half_widths(self) -> Floats:
        if self._steps == 0 or self._gain == 0:
            integral = np.zeros(len(self._alphas))
        else:
            angle = self._misses * math.log(self._steps + 1) / (self._saturation * (self._steps + 1))
            inside = np.abs(angle) < math.pi / 2
            integral = np.where(inside, self._gain * np.tan(np.where(inside, angle, 0.0)), np.copysign(np.inf, angle))
        return np.asarray(self._track + integral + self._forecast)

    def _offsets(self, lead: int) -> Floats:
        if self._count < min(self._needed(alpha) for alpha in self._alphas):
            ends = np.full(len(self._alphas), np.inf)
        else:
            short = np.array([self._count < self._needed(alpha) for alpha in self._alphas])
            ends = np.where(short, np.inf, np.maximum(0.0, self._half_widths()))
        return np.array([-ends, ends])

    def _observe(self, residuals: Floats) -> None:
        score = abs(float(residuals[0]))
        missed = score > self._half_widths()
        scale = float(self._scores.max())
        self._track = self._track + self.learning_rate * scale * (missed - self._alphas)
        self._misses = self._misses + (missed - self._alphas)
        self._steps += 1
        self._count += 1
        self._scores = np.append(self._scores, score)[-self.window :]
        self._forecast = self._scorecast()[1]

    def _available(self) -> int:
        return self._count


def autoregressive_scorecast(scores: npt.ArrayLike, order: int = 5) -> tuple[Floats, float]:
    """Least-squares autoregression of the scores.

    Parameters
    ----------
    scores
        Shape (n,), finite, n >= 1.
    order
        Lags, at least 1; with fewer than 2 order + 2 scores the mean of the scores stands in.

    Returns
    -------
    fitted
        float64, shape (n,); the first `order` are the mean of the scores.
    following
        Forecast of the next score.
    """
    check_integer(order, "order", 1)
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"scores must be finite numbers, shape (n,) with n >= 1, got shape {values.shape}.")
    fitted = np.full(len(values), values.mean())
    if len(values) < 2 * order + 2:
        return fitted, float(values.mean())
    lags = np.lib.stride_tricks.sliding_window_view(values, order)  # (n - order + 1, order)
    # In the unit of the scores, or the solver takes what is small against the ones for noise.
    design = np.column_stack([np.full(len(lags), binary_scale(values)), lags])
    coefficients = np.linalg.lstsq(design[:-1], values[order:], rcond=None)[0]
    forecasts = design @ coefficients
    fitted[order:] = forecasts[:-1]
    return fitted, float(forecasts[-1])
