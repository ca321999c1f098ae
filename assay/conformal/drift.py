"""Drift guard: are incoming texts that are known to be human still like the calibration texts?

Under H0 (exchangeable with the calibration texts) the smoothed ranks are independent uniforms and the wealth of a bet
against that is a test martingale. Reference: Vovk, Nouretdinov, Gammerman (2003), ICML; Vovk et al. (2021),
arXiv:2102.10439 (simple jumper); Ville (1939).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.conformal.checkpoint import generator_from, generator_state

# Stakes of a bet 1 + stake (p - 1/2), and how often the bettor changes between them: slow ones for lasting drift.
_STAKES = np.array([-1.8, -1.0, 0.0, 1.0, 1.8])
_JUMPS = np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


class DriftGuard:
    """Watches known-human texts for a change that would void a calibration.

    Guarantee: while incoming texts are exchangeable with the calibration texts, the probability of ever an alarm, at
    whatever time one looks, is at most `level`.

    Parameters
    ----------
    calibration
        Shape (n,), finite, n >= 1: the scores that the calibration holds.
    level
        In (0, 1).
    rng
        Breaks ties; every draw comes from it.

    Attributes
    ----------
    n_seen
        Texts watched so far.
    log_evidence
        Largest natural logarithm of the martingale so far; exp(-log_evidence) is an anytime-valid p-value.
    alarm_at
        Number, from 1, of the text that raised the alarm; None if none did.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> guard = DriftGuard(rng.normal(size=200), rng=rng)
    >>> [guard.update(score) for score in rng.normal(size=3)]
    [False, False, False]

    Notes
    -----
    Every text joins the ranks of those after it: p-values against a calibration set that stays as it is would not be
    independent, and their bets no martingale. A slow drift is therefore partly learned; compare with fresh calibration
    texts at times. O(log n) to rank and O(n) to insert.

    A guard that begins anew after a restart has lost its evidence, and over all beginnings the chance of a false alarm
    is no longer bounded by `level`: keep it in a `Checkpoint`.
    """

    def __init__(self, calibration: npt.ArrayLike, *, level: float = 0.01, rng: np.random.Generator) -> None:
        scores = np.asarray(calibration, dtype=np.float64)
        if scores.ndim != 1 or len(scores) == 0 or not np.isfinite(scores).all():
            raise ValueError(f"calibration must be finite scores of shape (n,), n >= 1, got shape {scores.shape}.")
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be in (0, 1), got {level}.")
        if not isinstance(rng, np.random.Generator):
            raise ValueError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}.")
        self.level = level
        self.n_seen = 0
        self.log_evidence = 0.0
        self.alarm_at: int | None = None
        self._rng = rng
        self._sorted: list[float] = np.sort(scores).tolist()
        # Logarithm of the wealth in each stake of each bettor; all begin with equal parts of 1.
        self._log_parts = np.full((len(_JUMPS), len(_STAKES)), -math.log(len(_JUMPS) * len(_STAKES)))

    @property
    def log_wealth(self) -> float:
        """Natural logarithm of the martingale now."""
        return float(np.logaddexp.reduce(self._log_parts, axis=None))

    def update(self, score: float) -> bool:
        """Watch one more known-human text; whether the alarm has been raised, now or before.

        Raises
        ------
        ValueError
            If the score is not finite; nothing changes.
        """
        if not math.isfinite(score):
            raise ValueError(f"score must be finite, got {score}. Leave out texts that could not be scored.")
        self.bet(self._rank(float(score)))
        return self.alarm_at is not None

    def bet(self, pvalue: float) -> None:
        """Bet on one p-value that is uniform under the null, independent of those before.

        Raises
        ------
        ValueError
            If the p-value is outside [0, 1]; nothing changes.
        """
        if not 0.0 <= pvalue <= 1.0:
            raise ValueError(f"pvalue must be in [0, 1], got {pvalue}.")
        together = np.logaddexp.reduce(self._log_parts, axis=1, keepdims=True)
        with np.errstate(divide="ignore"):  # the last bettor keeps nothing where it was: log 0
            stayed = np.log1p(-_JUMPS)[:, None] + self._log_parts
        jumped = np.logaddexp(stayed, np.log(_JUMPS / len(_STAKES))[:, None] + together)
        self._log_parts = jumped + np.log1p(_STAKES * (pvalue - 0.5))
        self.n_seen += 1
        self.log_evidence = max(self.log_evidence, self.log_wealth)
        if self.alarm_at is None and self.log_evidence >= -math.log(self.level):
            self.alarm_at = self.n_seen

    def state(self) -> dict[str, Any]:
        """All that later texts depend on, ready for JSON: for `Checkpoint`."""
        return {
            "level": self.level,
            "n_seen": self.n_seen,
            "log_evidence": self.log_evidence,
            "alarm_at": self.alarm_at,
            "scores": self._sorted,
            "log_parts": self._log_parts.tolist(),
            "rng": generator_state(self._rng),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> DriftGuard:
        """The guard that `state` described; its ties go on being broken by the same generator."""
        guard = cls(state["scores"], level=state["level"], rng=generator_from(state["rng"]))
        guard.n_seen, guard.alarm_at = state["n_seen"], state["alarm_at"]
        guard.log_evidence = state["log_evidence"]
        guard._log_parts = np.array(state["log_parts"])
        return guard

    def _rank(self, score: float) -> float:
        """The smoothed rank among all texts before, itself included, in (0, 1]; then it joins them."""
        low, high = bisect_left(self._sorted, score), bisect_right(self._sorted, score)
        above = len(self._sorted) - high
        rank = above + (1.0 - self._rng.random()) * (high - low + 1)
        rank /= len(self._sorted) + 1
        insort(self._sorted, score)
        return rank
