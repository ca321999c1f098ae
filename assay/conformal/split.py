"""Split conformal intervals: a model from the first rows, the spread of its errors from the later ones, then fixed.

Guarantee: P(y in interval) >= 1 - alpha in finite samples if the calibration rows and the new row are exchangeable.
Time series are not, which is what the other methods are for: this is their yardstick.
Source: Papadopoulos et al. (2002), ECML; Lei et al. (2018), JASA 113, Theorem 2.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from assay.conformal._arrays import Floats
from assay.conformal._ensemble import Predictor, fit_one, weighted_predictor
from assay.conformal._sequence import SequenceIntervals, check_real, upper_quantile


class SplitConformal(SequenceIntervals):
    """Symmetric intervals from one split of the training rows; updates are checked and change nothing.

    Parameters
    ----------
    estimator, alpha, random_state
        As in `SPCI`.
    calibration
        Share of the training rows, the latest, that calibrate; in (0, 1).
    """

    def __init__(
        self,
        estimator: Any = None,
        alpha: float | npt.ArrayLike = 0.1,
        *,
        calibration: float = 0.5,
        random_state: int | np.random.Generator | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.alpha = alpha
        self.calibration = calibration
        self.random_state = random_state

    def _check_parameters(self) -> None:
        check_real(self.calibration, "calibration", above=0, below=1)

    def _fit_base(self, base: Any, X: Floats, y: Floats, rng: np.random.Generator) -> tuple[Predictor, Floats]:
        cut = min(max(round(len(y) * (1 - self.calibration)), 1), len(y) - 1)
        model = fit_one(base, X[:cut], y[:cut], rng)
        predictor = weighted_predictor([model], np.ones(1))
        return predictor, y[cut:] - predictor(X[cut:])

    def _start(self, residuals: Floats, rng: np.random.Generator) -> None:
        scores = np.abs(residuals[0])
        self._scores = np.sort(scores[~np.isnan(scores)])

    def _observe(self, residuals: Floats) -> None:
        pass

    def _offsets(self, lead: int) -> Floats:
        ends = np.array([upper_quantile(self._scores, alpha) for alpha in self._alphas])
        return np.array([-ends, ends])

    def _available(self) -> int:
        return len(self._scores)
