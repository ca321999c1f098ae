"""Reusable holdouts: tune a detector against the same test set many times without fooling oneself.

Two guards. For thresholds on one fixed score, the DKW band: with probability 1 - beta the empirical distribution of n
scores is within sqrt(ln(2 / beta) / (2n)) of the true one everywhere, so every threshold may be looked at, for free.
For changing the detector itself, Thresholdout: it answers from the training set while the two agree, and pays from a
budget where they do not; with integer-exact noise it is epsilon-DP for replacing one holdout record.
References: Massart (1990) for the constant of DKW; Dwork, Feldman, Hardt, Pitassi, Reingold, Roth (2015),
"Generalization in adaptive data analysis and holdout reuse", arXiv:1506.02629; Dwork, Roth (2014), theorem 3.25.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Cost
from assay.privacy.errors import BudgetError
from assay.privacy.noise import NoiseSource, laplace_scale, noise_source

Floats = npt.NDArray[np.float64]
Question = Literal["threshold", "detector"]

# Values in [0, 1] are held as multiples of 2**-20, so that sums and noise are integers.
_BITS = 20


@dataclass(frozen=True)
class Band:
    """A simultaneous confidence band for the distribution of a score.

    Attributes
    ----------
    half_width
        Covers every threshold at once with probability 1 - beta, for independent records.
    beta
        Chance that some threshold lies outside.
    n
        Records.
    """

    half_width: float
    beta: float
    n: int

    def rates(self, scores: npt.ArrayLike, thresholds: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Share of scores at or above each threshold, with the band's lower and upper end, cut to [0, 1]."""
        ordered = np.sort(_finite(scores, "scores"))
        if len(ordered) != self.n:
            raise ValueError(f"scores must be the {self.n} that the band is for, got {len(ordered)}.")
        at = _finite(thresholds, "thresholds")
        share: Floats = 1 - np.searchsorted(ordered, at, side="left") / self.n
        return share, np.maximum(share - self.half_width, 0), np.minimum(share + self.half_width, 1)


def dkw_band(n: int, *, beta: float = 0.05) -> Band:
    """The Dvoretzky-Kiefer-Wolfowitz band with Massart's constant.

    Parameters
    ----------
    n
        Independent records, at least 1.
    beta
        In (0, 1).
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"n must be a positive integer, got {n!r}.")
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}.")
    return Band(min(1.0, math.sqrt(math.log(2 / beta) / (2 * n))), beta, n)


@dataclass(frozen=True)
class Answer:
    """What a holdout says about a query.

    Attributes
    ----------
    value
        The estimate, in [0, 1] up to noise.
    from_holdout
        Whether the training value was off and the noisy holdout value was given instead; it cost one of the budget.
    remaining
        How many such answers are left.
    """

    value: float
    from_holdout: bool
    remaining: int


class Holdout:
    """Thresholdout over a training set and a holdout set of records.

    Guarantee: replacing one holdout record changes the law of all answers together by at most exp(`epsilon`),
    epsilon = 2 budget / (sigma n) and the rounding of values to multiples of 2**-20 (one part in a million). By that a
    query chosen from the answers has an expected overfit of at most exp(epsilon) - 1: no promise once epsilon is about
    1. Where fewer answers are paid for than the budget, the gain is larger in practice than is proved.
    The holdout must not be looked at in any other way; the training set may be. A query must have an answer for every
    record: one that raises on some holdout record has told about it without noise.

    Parameters
    ----------
    train, holdout
        Records, any sequences; queries see one sequence at a time.
    budget
        How many overfits may be found before it stops, at least 1.
    threshold
        How far training and holdout may differ before the holdout answers; default 4 / sqrt(n).
    sigma
        Scale of the noise; default 1 / sqrt(n).
    noise
        Default `noise_source()`.

    Examples
    --------
    >>> from assay.privacy import SeededNoise
    >>> guard = Holdout([0.2] * 500, [0.4] * 500, budget=3, noise=SeededNoise(1))
    >>> guard.ask(lambda records: [value > 0.3 for value in records]).from_holdout
    True
    """

    def __init__(
        self,
        train: npt.ArrayLike,
        holdout: npt.ArrayLike,
        *,
        budget: int,
        threshold: float | None = None,
        sigma: float | None = None,
        noise: NoiseSource | None = None,
    ) -> None:
        self._train, self._holdout = train, holdout
        self._n = len(holdout)  # type: ignore[arg-type]
        if self._n < 2 or len(train) < 2:  # type: ignore[arg-type]
            raise ValueError("train and holdout must have at least 2 records each.")
        if type(budget) is not int or budget < 1:
            raise ValueError(f"budget must be a positive integer, got {budget!r}.")
        self._threshold = 4 / math.sqrt(self._n) if threshold is None else threshold
        sigma = 1 / math.sqrt(self._n) if sigma is None else sigma
        for name, value in (("threshold", self._threshold), ("sigma", sigma)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        self._noise = noise_source() if noise is None else noise
        self._unit = 2**_BITS  # one record moves an integer sum by at most this
        # Noise for the integer sum over the holdout: sigma in units of the mean is sigma n 2**20 in units of the sum.
        self._scale = laplace_scale(Fraction(sigma) * self._n * self._unit)
        self._budget = self._remaining = budget
        self._gamma = self._draw(2)

    @staticmethod
    def advise(question: Question, n: int, *, beta: float = 0.05) -> str:
        """Which of the two guards a question needs, in a sentence.

        Parameters
        ----------
        question
            "threshold": only the threshold on one fixed score is tuned; "detector": the score itself is.
        n
            Records in the holdout.
        beta
            For the band.
        """
        if question == "threshold":
            width = dkw_band(n, beta=beta).half_width
            return (
                f"Use dkw_band: all thresholds at once hold within {width:.3g} at n = {n} with probability "
                f"{1 - beta:g}, as often as you like, without a budget."
            )
        if question != "detector":
            raise ValueError(f"question must be 'threshold' or 'detector', got {question!r}.")
        most = int(math.sqrt(n) / 2)
        return (
            f"Use Holdout: the detector depends on earlier answers, so no band covers it. At n = {n} and the default "
            f"noise a budget of at most {most} keeps epsilon at 1 or below."
        )

    @property
    def epsilon(self) -> float:
        """Epsilon of all answers together if the whole budget is used, for replacing one holdout record."""
        return float(2 * self._budget * self._unit / self._scale)

    @property
    def cost(self) -> Cost:
        """The same as a `Cost`, for a ledger over documents."""
        return Cost.pure(2 * self._budget * self._unit / self._scale, adjacency="replace", unit="document")

    @property
    def remaining(self) -> int:
        """How many answers from the holdout are left."""
        return self._remaining

    @property
    def overfit_bound(self) -> float:
        """exp(epsilon) - 1, cut at 1: what is proved about the expected overfit of a query chosen from the answers."""
        return min(1.0, math.expm1(min(self.epsilon, 1.0)))

    def ask(self, query: Callable[[npt.ArrayLike], npt.ArrayLike]) -> Answer:
        """The mean of a query over records.

        Parameters
        ----------
        query
            Takes the records of one set and gives one value in [0, 1] for each, each from its own record alone.

        Raises
        ------
        BudgetError
            If the budget is used up: take a fresh holdout.
        ValueError
            If the query's values are not one per record and in [0, 1].
        """
        if self._remaining == 0:
            raise BudgetError(
                "the holdout's budget is used up; its records no longer protect. Take a fresh holdout set."
            )
        train = self._sum(query, self._train)
        held = self._sum(query, self._holdout)
        n_train = len(self._train)  # type: ignore[arg-type]
        # Both means over one denominator: integers, so that one record moves the gap by n_train 2**20 at most.
        gap = abs(held * n_train - train * self._n)
        noisy = gap - (self._gamma + self._draw(4)) * n_train
        if noisy <= Fraction(self._threshold) * self._n * n_train * self._unit:
            return Answer(train / (n_train * self._unit), False, self._remaining)
        self._remaining -= 1
        self._gamma = self._draw(2)
        return Answer((held + self._draw(1)) / (self._n * self._unit), True, self._remaining)

    def __repr__(self) -> str:
        return f"Holdout(n={self._n}, remaining={self._remaining} of {self._budget}, epsilon={self.epsilon:.3g})"

    def _draw(self, times: int) -> int:
        return int(np.asarray(self._noise.laplace(laplace_scale(times * self._scale), 1))[0])

    def _sum(self, query: Callable[[npt.ArrayLike], npt.ArrayLike], records: npt.ArrayLike) -> int:
        values = np.asarray(query(records), dtype=np.float64)
        if values.shape != (len(records),):  # type: ignore[arg-type]
            raise ValueError(f"query must give one value per record, got shape {values.shape}.")
        if not np.all((values >= 0) & (values <= 1)):  # NaN fails too
            raise ValueError("query must give values in [0, 1], without NaN.")
        return int(np.rint(values * self._unit).astype(np.int64).sum())


def _finite(values: npt.ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite.")
    return array
