"""What every interval method for sequences shares: checks, the fitted base models, and the loop of predict and update.

A method is a subclass that says how far the interval lies from the point forecast (`_offsets`) and what it learns from
one new residual (`_observe`). Base models are fitted once, on the training rows, and never again.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.linear_model import LinearRegression
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import check_is_fitted, validate_data

from assay.conformal._arrays import Floats
from assay.conformal._ensemble import Predictor, fit_ensemble, weighted_predictor

# The methods square residuals and sum them: beyond these sizes that leaves float64, and intervals of NaN cover nothing.
_LARGEST, _LARGEST_RESIDUAL = 1e100, 1e120


class ShortCalibrationWarning(UserWarning):
    """Too few residuals for the level or the window: the interval is infinite; the message says how many it takes."""


class SequenceIntervals(BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn is untyped
    """Base of the interval methods; see `SPCI` for the meaning of `fit`, `predict`, `update` and `backtest`."""

    # Set by the constructors of the methods.
    estimator: Any
    n_bootstraps: int
    alpha: float | npt.ArrayLike
    random_state: int | np.random.Generator | np.random.RandomState | None

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike, times: npt.ArrayLike | None = None) -> Self:
        """Fit the base models and start the sequence of residuals.

        Parameters
        ----------
        X
            Features, shape (n, features), n >= 2, finite, in the order of time.
        y
            Targets, shape (n,), in [-1e100, 1e100].
        times
            Optional, shape (n,), numbers or datetime64, strictly increasing. If given here, `update` needs them too
            and refuses times that do not come after all earlier ones.

        Returns
        -------
        The estimator itself.

        Raises
        ------
        ValueError
            On NaN, infinity, wrong shapes, targets or forecasts too large to be squared, parameters out of range, or
            times that do not increase.
        """
        self._alphas = check_alphas(self.alpha)
        self._check_parameters()
        rows, truth = self._pairs(X, y, reset=True)
        n = len(truth)
        self._timed = times is not None
        self._last_time = self._check_times(times, n, None)
        rng = generator(self.random_state)
        horizon = self._horizon()
        if n < horizon + 1:
            raise ValueError(f"fit needs at least horizon + 1 = {horizon + 1} samples, got {n}.")
        base = LinearRegression() if self.estimator is None else self.estimator
        self._predictors: list[Predictor] = []
        residuals = np.full((horizon, n), np.nan)
        for lead in range(horizon):
            predictor, found = self._fit_base(base, rows[: n - lead], truth[lead:], rng)
            check_forecasts(found)
            self._predictors.append(predictor)
            residuals[lead, -len(found) :] = found
        self._recent_rows = rows[n - horizon + 1 :]
        self._start(residuals, rng)
        self.n_train_ = n
        return self

    def predict(self, X: npt.ArrayLike) -> tuple[Floats, Floats]:
        """Forecasts and intervals for the rows that come next. Changes nothing: call `update` when the truth arrives.

        Parameters
        ----------
        X
            Features of the next rows, shape (m, features). Of every `horizon` rows only the first is read, the others
            may be NaN; with horizon 1 every row is read. All intervals rest on the residuals known now, so those of
            rows beyond the horizon are as wide as if they were within it.

        Returns
        -------
        point
            float64, shape (m,).
        intervals
            float64, shape (m, 2, number of alphas): lower ends in [:, 0], upper ends in [:, 1]. Infinite where the
            residuals are too few.

        Warns
        -----
        ShortCalibrationWarning
            If an interval is infinite for want of residuals.
        """
        if not hasattr(self, "n_train_"):
            check_is_fitted(self, "n_train_")
        horizon = self._horizon()
        if horizon == 1 and self._is_plain(X):
            rows = np.asarray(X)
        else:
            finite = True if horizon == 1 else "allow-nan"
            rows = validate_data(self, X, reset=False, dtype=np.float64, ensure_all_finite=finite)
        point = self._points(rows)
        check_forecasts(point)
        leads = min(horizon, len(rows))
        offsets = np.array([self._offsets(lead) for lead in range(leads)])
        self._warn_if_short(offsets)
        return point, point[:, None, None] + offsets[np.arange(len(rows)) % leads]

    def update(self, X: npt.ArrayLike, y: npt.ArrayLike, times: npt.ArrayLike | None = None) -> Self:
        """Take in the truth about the rows that came next, in the order of time.

        Parameters
        ----------
        X, y, times
            As in `fit`, at least one row. Every row is read, also with a horizon above 1.

        Returns
        -------
        The estimator itself.

        Raises
        ------
        ValueError
            As `fit`; nothing is taken in then.
        """
        if not hasattr(self, "n_train_"):
            check_is_fitted(self, "n_train_")
        rows, truth = self._pairs(X, y, reset=False)
        last = self._check_times(times, len(truth), self._last_time)
        for column in self._residuals_of(rows, truth).T:
            self._observe(column)
        self._last_time = last
        self._settle()
        return self

    def backtest(self, X: npt.ArrayLike, y: npt.ArrayLike, times: npt.ArrayLike | None = None) -> tuple[Floats, Floats]:
        """What a loop of `predict` and `update`, `horizon` rows at a time, gives; base models are asked once.

        Parameters
        ----------
        X, y, times
            As in `update`. The truth of a row is used only after its interval is fixed.

        Returns
        -------
        point, intervals
            As from `predict`.
        """
        if not hasattr(self, "n_train_"):
            check_is_fitted(self, "n_train_")
        rows, truth = self._pairs(X, y, reset=False)
        n, horizon = len(truth), self._horizon()
        last = self._check_times(times, n, self._last_time)
        point = self._points(rows)
        residuals = self._residuals_of(rows, truth)
        offsets = np.empty((n, 2, len(self._alphas)))
        for first in range(0, n, horizon):
            block = range(first, min(first + horizon, n))
            for row in block:
                offsets[row] = self._offsets(row - first)
            for row in block:
                self._observe(residuals[:, row])
            self._settle()
        self._last_time = last
        self._warn_if_short(offsets)
        return point, point[:, None, None] + offsets

    # --- what a method says -------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        """Refuse parameters of the method that are out of range."""
        check_integer(self.n_bootstraps, "n_bootstraps", 1)

    def _horizon(self) -> int:
        return 1

    def _fit_base(self, base: Any, X: Floats, y: Floats, rng: np.random.Generator) -> tuple[Predictor, Floats]:
        """A predictor for new rows, and residuals (at most n,) that end with the last training row."""
        models, weights, residuals = fit_ensemble(base, X, y, self.n_bootstraps, rng)
        return weighted_predictor(models, weights), residuals

    @abstractmethod
    def _start(self, residuals: Floats, rng: np.random.Generator) -> None:
        """Begin with the residuals (horizon, n) of the training rows."""

    @abstractmethod
    def _offsets(self, lead: int) -> Floats:
        """Ends of the interval less the point forecast, (2, alphas), `lead` steps after the next one."""

    @abstractmethod
    def _observe(self, residuals: Floats) -> None:
        """Learn from the next row's residuals, (horizon,): one for each lead it could have been forecast with."""

    def _settle(self) -> None:
        """Called after the last row of an update."""

    def _needed(self, alpha: float) -> int:
        """How many residuals make the interval at this level finite."""
        return attainable(alpha)

    @abstractmethod
    def _available(self) -> int:
        """How many residuals there are now."""

    # --- shared -------------------------------------------------------------------------------------------------------

    def _pairs(self, X: npt.ArrayLike, y: npt.ArrayLike, *, reset: bool) -> tuple[Floats, Floats]:
        if not reset and self._is_plain(X) and type(y) is np.ndarray and y.dtype == np.float64:
            rows, values = np.asarray(X), np.asarray(y)
            # Comparing is False for NaN too.
            if values.shape == (len(rows),) and (np.abs(values) <= _LARGEST).all():
                return rows, values
        checked, truth = validate_data(
            self, X, y, reset=reset, dtype=np.float64, y_numeric=True, ensure_min_samples=2 if reset else 1
        )
        values = truth.astype(np.float64)
        largest = float(np.abs(values).max())
        if largest > _LARGEST:
            raise ValueError(f"y must be in [-{_LARGEST:g}, {_LARGEST:g}], got {largest:g} in size. Rescale y.")
        return checked, values

    def _is_plain(self, X: object) -> bool:
        """Whether X needs none of scikit-learn's checks, which cost a third of a millisecond for one row."""
        return (
            type(X) is np.ndarray
            and X.dtype == np.float64
            and X.ndim == 2
            and X.shape[0] > 0
            and X.shape[1] == self.n_features_in_
            and not hasattr(self, "feature_names_in_")
            and bool(np.isfinite(X).all())
        )

    def _points(self, X: Floats) -> Floats:
        horizon = self._horizon()
        point = np.empty(len(X))
        origins = X[::horizon]
        if horizon > 1:
            assert_all_finite(origins, input_name="X", estimator_name=type(self).__name__)
        for lead in range(min(horizon, len(X))):
            count = len(X[lead::horizon])
            point[lead::horizon] = self._predictors[lead](origins[:count])
        return point

    def _residuals_of(self, X: Floats, y: Floats) -> Floats:
        """(horizon, m): for each lead the residual of the forecast made that many rows earlier."""
        horizon = self._horizon()
        joined = np.concatenate([self._recent_rows, X]) if horizon > 1 else X
        m, before = len(y), horizon - 1
        found = np.array(
            [y - self._predictors[lead](joined[before - lead : before - lead + m]) for lead in range(horizon)]
        )
        check_forecasts(found)
        self._recent_rows = joined[len(joined) - before :]
        return found

    def _warn_if_short(self, offsets: Floats) -> None:
        have = self._available()
        short = [alpha for alpha in self._alphas if have < self._needed(alpha)]
        if short and not np.isfinite(offsets).all():
            alpha = min(short)
            warnings.warn(
                f"{have} residuals are too few for alpha={alpha:g}: the interval is infinite until there are "
                f"{self._needed(alpha)}.",
                ShortCalibrationWarning,
                stacklevel=3,
            )

    def _check_times(self, times: npt.ArrayLike | None, n: int, last: Any) -> Any:
        """The last time, after checking that all are later than `last` and increase."""
        if (times is not None) != self._timed:
            raise ValueError(
                "times were given to fit: give them to every update as well."
                if self._timed
                else "times were not given to fit: leave them out of updates as well."
            )
        if times is None:
            return None
        values = np.asarray(times)
        if values.shape != (n,):
            raise ValueError(f"times must have shape ({n},), one for each row, got {values.shape}.")
        if values.dtype.kind not in "iufM" or (values.dtype.kind in "fM" and not (values == values).all()):
            raise ValueError(f"times must be numbers or datetime64 without NaN or NaT, got dtype {values.dtype}.")
        if last is not None and not values[0] > last:
            raise ValueError(f"times must go on after {last}, got {values[0]}. Rows that were taken in stay taken in.")
        if not (values[1:] > values[:-1]).all():
            place = int(np.flatnonzero(~(values[1:] > values[:-1]))[0]) + 1
            raise ValueError(f"times must increase strictly, got {values[place]} after {values[place - 1]}.")
        return values[-1]


def check_forecasts(values: Floats) -> None:
    """Refuse forecasts, or residuals, that are not finite or too large to be squared."""
    # Comparing is False for NaN too.
    if not (np.abs(values) <= _LARGEST_RESIDUAL).all():
        worst = float(np.abs(values).max())
        raise ValueError(
            f"forecasts of the base models must lie within {_LARGEST_RESIDUAL:g} of y, got {worst:g}. Rescale the "
            "features, or take another estimator."
        )


def check_alphas(alpha: float | npt.ArrayLike) -> Floats:
    """float64, shape (k,): the miscoverage levels, each inside (0, 1)."""
    values = np.atleast_1d(np.asarray(alpha, dtype=np.float64))
    if values.ndim != 1 or len(values) == 0 or not ((values > 0) & (values < 1)).all():
        raise ValueError(f"alpha must be in (0, 1), or a sequence of such levels, got {alpha!r}.")
    return values


def check_integer(value: int, name: str, least: int) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_real(value: float, name: str, *, above: float = -math.inf, below: float = math.inf) -> None:
    """Refuse what is not a number strictly between the bounds."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or not above < value < below:
        raise ValueError(f"{name} must be a number in ({above:g}, {below:g}), got {value!r}.")


def attainable(alpha: float) -> int:
    """Fewest residuals among which a (1 - alpha)-quantile with its finite-sample correction exists."""
    # The margin undoes rounding: 1 / 0.1 - 1 is 9, and must not become 10.
    return max(1, math.ceil((1 - alpha) / alpha - 1e-9))


def upper_quantile(sorted_scores: Floats, alpha: float) -> float:
    """The ceil((m + 1)(1 - alpha))-th smallest of m sorted scores; inf beyond the last, -inf before the first."""
    m = len(sorted_scores)
    rank = math.ceil((m + 1) * (1 - alpha) - 1e-9)
    if rank > m:
        return math.inf
    return float(sorted_scores[rank - 1]) if rank >= 1 else -math.inf


def generator(random_state: int | np.random.Generator | np.random.RandomState | None) -> np.random.Generator:
    """The generator itself, or one seeded by a number; None takes fresh entropy."""
    if isinstance(random_state, np.random.Generator):
        return random_state
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(2**31))
    return np.random.default_rng(random_state)
