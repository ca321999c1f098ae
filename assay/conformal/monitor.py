"""Alarm when a source's detector scores leave their intervals too often: SPCI for the intervals, betting for the alarm.

Guarantee: if, given the past, every interval misses with probability at most `max_miss_rate`, an alarm is ever raised
with probability at most `false_alarm`, however long the source is watched (Ville's inequality). SPCI's miss rate is
alpha only asymptotically, hence the slack between alpha and `max_miss_rate`.
Source: Ville (1939); Ramdas et al. (2023), Statistical Science 38(4), arXiv:2210.01948; Xu and Xie (2023), SPCI.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator

from assay.conformal._arrays import Bools, Floats
from assay.conformal.checkpoint import generator_from, generator_state

Direction = Literal["both", "above", "below"]
_LARGEST = 1e100


class MissMartingale:
    """Evidence, valid at any time, that misses occur more often than a given rate.

    Guarantee: while each miss has conditional probability at most `rate` given the past, `evalue` is a nonnegative
    supermartingale from 1: P(it ever reaches 1 / a) <= a.

    For each alternative rate q in a grid and each starting step j, the product of the likelihood ratios of q against
    `rate` from step j on; averaged over q, and over j with weights 1 / (j (j + 1)). The starting steps keep a long
    quiet stretch from using up the evidence of what follows: a change at step j costs 2 log(j + 1), not a loss that
    grows with j. O(1) for each step.

    Parameters
    ----------
    rate
        In (0, 1).
    n_alternatives
        Rates q, equally spaced between `rate` and 1, at least 1.
    """

    def __init__(self, rate: float, n_alternatives: int = 9) -> None:
        if not isinstance(rate, (int, float)) or not 0 < rate < 1:
            raise ValueError(f"rate must be in (0, 1), got {rate!r}.")
        if isinstance(n_alternatives, bool) or not isinstance(n_alternatives, int) or n_alternatives < 1:
            raise ValueError(f"n_alternatives must be a whole number of at least 1, got {n_alternatives!r}.")
        self._rate = float(rate)
        q = rate + (1 - rate) * np.arange(1, n_alternatives + 1) / (n_alternatives + 1)
        self._log_hit, self._log_miss = np.log1p(-q) - math.log1p(-rate), np.log(q) - math.log(rate)
        self._log_started = np.full(n_alternatives, -np.inf)
        self.n_steps = 0
        self.log_evalue = 0.0

    def update(self, missed: bool) -> float:
        """Take in one step; the natural logarithm of the e-value after it."""
        self.n_steps += 1
        t = self.n_steps
        started = np.logaddexp(self._log_started, -math.log(t) - math.log(t + 1))
        self._log_started = started + (self._log_miss if missed else self._log_hit)
        # What starts later still stands at 1, with the weight that is left: sum over j > t of 1 / (j (j + 1)).
        mean = float(np.logaddexp.reduce(self._log_started)) - math.log(len(self._log_started))
        self.log_evalue = float(np.logaddexp(mean, -math.log(t + 1)))
        return self.log_evalue

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, ready for JSON: for `Checkpoint`."""
        return {
            "rate": self._rate,
            "n_alternatives": len(self._log_started),
            "n_steps": self.n_steps,
            "log_evalue": self.log_evalue,
            # Before the first step these are logarithms of 0, which JSON does not know.
            "log_started": self._log_started.tolist() if self.n_steps else None,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> MissMartingale:
        """The martingale that `state` described."""
        martingale = cls(state["rate"], state["n_alternatives"])
        martingale.n_steps, martingale.log_evalue = state["n_steps"], state["log_evalue"]
        if martingale.n_steps:
            martingale._log_started = np.array(state["log_started"])
        return martingale


@dataclass(frozen=True, kw_only=True, eq=False)
class MonitorResult:
    """What a monitor saw.

    Attributes
    ----------
    scores
        float64, shape (n,): the scores watched, without the reference.
    point, lower, upper
        float64, shape (n,): forecasts, and ends of the intervals.
    missed
        bool, shape (n,): whether a score left its interval on a side that counts.
    log_evalue
        float64, shape (n,): natural logarithm of the e-value after each score.
    alarm
        Index of the first score at which the e-value reached 1 / false_alarm, or None.
    false_alarm, max_miss_rate, alpha
        The bound on the probability of any false alarm, the miss rate that it presumes, and the level of the intervals.
    """

    scores: Floats
    point: Floats
    lower: Floats
    upper: Floats
    missed: Bools
    log_evalue: Floats
    alarm: int | None
    false_alarm: float
    max_miss_rate: float
    alpha: float

    def sentence(self) -> str:
        """The result in words."""
        rate = f"{int(self.missed.sum())} of {len(self.scores)} scores left their intervals"
        if self.alarm is None:
            return f"No alarm: {rate}."
        return (
            f"Alarm at score {self.alarm + 1}: {rate}. If every interval missed with probability at most "
            f"{self.max_miss_rate:g}, an alarm would ever be raised with probability at most {self.false_alarm:g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; infinite ends are null."""
        ends = {
            name: [float(x) if math.isfinite(x) else None for x in getattr(self, name)] for name in ("lower", "upper")
        }
        return {
            "schema": "assay.monitor/1",
            "alarm": self.alarm,
            "n_scores": len(self.scores),
            "n_missed": int(self.missed.sum()),
            "false_alarm": self.false_alarm,
            "max_miss_rate": self.max_miss_rate,
            "alpha": self.alpha,
            "scores": self.scores.tolist(),
            "point": self.point.tolist(),
            **ends,
            "missed": self.missed.tolist(),
            "log_evalue": self.log_evalue.tolist(),
        }


@dataclass(frozen=True)
class _Watch:
    """The bound and the intervals of a watch, fixed when it begins: changed on the way, the bound would not hold."""

    alpha: float
    level: float
    false_alarm: float
    max_miss_rate: float
    direction: Direction
    lags: int


class ScoreMonitor(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Watches the scores of one source, one after the other.

    Parameters
    ----------
    alpha
        Miscoverage level of the intervals; in (0, 1), with one direction in (0, 0.5).
    false_alarm
        Bound on the probability that an alarm is ever raised without cause, in (0, 1).
    max_miss_rate
        Miss rate that is still in order, in [alpha, 1); None for the smaller of 1.5 alpha and (1 + alpha) / 2.
    direction
        Which misses count: "both", or scores "above" or "below" their intervals only.
    lags
        Last scores from which the next is forecast by least squares, at least 1.
    window
        Residuals that SPCI's forest sees, at least 1.
    random_state
        Generator, or seed, of every draw.

    Notes
    -----
    Forecasts and forest are learnt from the reference and then stay as they are; only the last scores, from which the
    next interval follows, move on. The longer the reference, the nearer the miss rate to alpha: give at least 200
    scores, better 400.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        false_alarm: float = 0.01,
        max_miss_rate: float | None = None,
        direction: Direction = "both",
        lags: int = 5,
        window: int = 20,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.alpha = alpha
        self.false_alarm = false_alarm
        self.max_miss_rate = max_miss_rate
        self.direction = direction
        self.lags = lags
        self.window = window
        self.random_state = random_state
        self._check()

    def _check(self) -> _Watch:
        """What `fit` and `update` go by; refuses parameters that are out of range."""
        from assay.conformal._sequence import check_integer, check_real

        if self.direction not in ("both", "above", "below"):
            raise ValueError(f'direction must be "both", "above" or "below", got {self.direction!r}.')
        check_real(self.alpha, "alpha", above=0, below=1 if self.direction == "both" else 0.5)
        check_real(self.false_alarm, "false_alarm", above=0, below=1)
        check_integer(self.lags, "lags", 1)
        check_integer(self.window, "window", 1)
        given = self.max_miss_rate
        rate = min(1.5 * self.alpha, (1 + self.alpha) / 2) if given is None else given
        if not isinstance(rate, (int, float)) or not self.alpha <= rate < 1:
            raise ValueError(f"max_miss_rate must be in [alpha, 1) = [{self.alpha:g}, 1), got {given!r}.")
        # One side is watched at level alpha by the symmetric interval of level 2 alpha: its other end is not looked at.
        level = self.alpha if self.direction == "both" else 2 * self.alpha
        return _Watch(self.alpha, level, self.false_alarm, rate, self.direction, self.lags)

    @property
    def alarmed(self) -> bool:
        """Whether the alarm has been raised since `fit`."""
        return bool(getattr(self, "_alarmed", False))

    @property
    def reference(self) -> Floats:
        """The scores that `fit` was given."""
        self._check_fitted()
        return self._reference

    @property
    def n_reference(self) -> int:
        """Fewest scores that `fit` accepts: fewer would leave the intervals infinite, and the monitor blind."""
        from assay.conformal._sequence import attainable

        return self.lags + self.window + attainable(self._check().level)

    def fit(self, scores: npt.ArrayLike) -> ScoreMonitor:
        """Learn from reference scores, of a time when the source was in order.

        Raises
        ------
        ValueError
            On NaN, wrong shape, or fewer scores than `n_reference`.
        """
        from assay.conformal._sequence import generator
        from assay.conformal.spci import SPCI

        watch = self._check()
        values = _check_scores(scores)
        if len(values) < self.n_reference:
            raise ValueError(
                f"the reference must have at least {self.n_reference} scores for these lags, window and alpha, got "
                f"{len(values)}. Give more, or a smaller window."
            )
        rng = generator(self.random_state)
        # A copy from before the draws: with it the same model can be learnt again.
        at_fit = copy.deepcopy(rng)
        model = SPCI(
            window=self.window,
            alpha=watch.level,
            # The symmetric pair of quantiles, and leaves that are not tiny: both keep the miss rate close to alpha.
            n_betas=1,
            min_samples_leaf=20,
            # Grown once, on the reference. A forest that goes on learning takes the change for the new normal within
            # alpha n steps, before the evidence can reach the threshold.
            refit_every=sys.maxsize,
            random_state=rng,
        )
        self._model = model.fit(_rows(values, watch.lags), values[watch.lags :])
        self._reference, self._fitted_with, self._rng_at_fit = values, self.get_params(), at_fit
        self._watch = watch
        self._last = values[-watch.lags :]
        self._martingale = MissMartingale(watch.max_miss_rate)
        self._alarmed = False
        return self

    def update(self, scores: npt.ArrayLike) -> MonitorResult:
        """Watch the scores that came next; the e-value goes on from where it was.

        `alarm` of the result is the first of these scores at which the e-value stood at 1 / false_alarm or had reached
        it before: an alarm once raised stays.
        """
        self._check_fitted()
        values = _check_scores(scores)
        if len(values) == 0:
            raise ValueError("scores must hold at least one score, got none.")
        watch = self._watch
        joined = np.concatenate([self._last, values])
        point, intervals = self._model.backtest(_rows(joined, watch.lags), values)
        self._last = joined[-watch.lags :]
        lower, upper = intervals[:, 0, 0], intervals[:, 1, 0]
        lower = np.full_like(lower, -np.inf) if watch.direction == "above" else lower
        upper = np.full_like(upper, np.inf) if watch.direction == "below" else upper
        missed = (values < lower) | (values > upper)
        log_evalue = np.array([self._martingale.update(bool(miss)) for miss in missed])
        raised = np.flatnonzero(log_evalue >= -math.log(watch.false_alarm))
        first = 0 if self._alarmed else (int(raised[0]) if len(raised) else None)
        self._alarmed = first is not None
        return MonitorResult(
            scores=values,
            point=point,
            lower=lower,
            upper=upper,
            missed=missed,
            log_evalue=log_evalue,
            alarm=first,
            false_alarm=watch.false_alarm,
            max_miss_rate=watch.max_miss_rate,
            alpha=watch.alpha,
        )

    def state(self) -> dict[str, Any]:
        """All that later scores depend on, ready for JSON: for `Checkpoint`.

        The model is not in it: it is learnt again from the reference with the same draws. With another version of numpy
        or scikit-learn its last digits may differ; every interval is still fixed before its score, and the bound holds.
        """
        self._check_fitted()
        settings = {name: value for name, value in self._fitted_with.items() if name != "random_state"}
        return {
            "settings": settings,
            "rng": generator_state(self._rng_at_fit),
            "reference": self._reference.tolist(),
            "residuals": self._model._residuals[0].tolist(),
            "last": self._last.tolist(),
            "martingale": self._martingale.state(),
            "alarmed": self._alarmed,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ScoreMonitor:
        """The monitor that `state` described."""
        monitor = cls(**state["settings"], random_state=generator_from(state["rng"]))
        monitor.fit(state["reference"])
        monitor._model._residuals = np.array([state["residuals"]])
        monitor._last = np.array(state["last"])
        monitor._martingale = MissMartingale.from_state(state["martingale"])
        monitor._alarmed = state["alarmed"]
        return monitor

    def _check_fitted(self) -> None:
        if not hasattr(self, "_martingale"):
            raise ValueError("fit comes before update: no reference scores were given yet.")


def _rows(values: Floats, lags: int) -> Floats:
    return np.lib.stride_tricks.sliding_window_view(values, lags)[: len(values) - lags]


def monitor_scores(
    scores: npt.ArrayLike,
    *,
    reference: int,
    alpha: float = 0.1,
    false_alarm: float = 0.01,
    max_miss_rate: float | None = None,
    direction: Direction = "both",
    lags: int = 5,
    window: int = 20,
    random_state: int | np.random.Generator | None = None,
) -> MonitorResult:
    """Watch a series of scores of which the first `reference` are known to be in order.

    Guarantee and parameters as in `ScoreMonitor`.

    Parameters
    ----------
    scores
        Shape (n,), finite, in the order of time, n > reference.
    reference
        How many of the first scores are the reference.
    """
    values = _check_scores(scores)
    if len(values) < 2:
        raise ValueError(f"scores must hold the reference and at least one score more, got {len(values)}.")
    if isinstance(reference, bool) or not isinstance(reference, (int, np.integer)) or not 0 < reference < len(values):
        raise ValueError(f"reference must be in 1..{len(values) - 1}, one less than the scores, got {reference!r}.")
    monitor = ScoreMonitor(
        alpha=alpha,
        false_alarm=false_alarm,
        max_miss_rate=max_miss_rate,
        direction=direction,
        lags=lags,
        window=window,
        random_state=random_state,
    )
    return monitor.fit(values[:reference]).update(values[reference:])


def _check_scores(scores: npt.ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"scores must be finite numbers, shape (n,), got shape {values.shape} or NaN or infinity.")
    if len(values) and np.abs(values).max() > _LARGEST:
        # Squares beyond the largest float would make intervals of NaN, which nothing ever misses.
        raise ValueError(f"scores must be in [-{_LARGEST:g}, {_LARGEST:g}], got {values[np.abs(values).argmax()]:g}.")
    return values
