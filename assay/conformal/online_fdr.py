"""False discovery rates of streams: each document is judged when it arrives, and judgements stand.

Reference: Ramdas, Yang, Wainwright, Jordan (2017), arXiv:1710.00499 (LORD++); Ramdas, Zrnic, Wainwright, Jordan (2018),
arXiv:1802.09098 (SAFFRON); Xu and Ramdas (2024), arXiv:2311.06412 (e-LOND).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

# 1 / sum of log(max(t, 2)) / (t exp(sqrt(log t))) and 1 / zeta(1.6), rounded down: the sequences sum to at most 1.
_LORD_SCALE = 0.0790
_POWER_SCALE = 0.4374


def _lord_spending(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sequence of the LORD paper at t >= 1; 0 at t < 1."""
    safe = np.maximum(t, 1.0)
    out: npt.NDArray[np.float64] = _LORD_SCALE * np.log(np.maximum(safe, 2.0)) / (safe * np.exp(np.sqrt(np.log(safe))))
    return np.where(t < 1.0, 0.0, out)


def _power_spending(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """t^-1.6 / zeta(1.6) at t >= 1; 0 at t < 1."""
    return np.where(t < 1.0, 0.0, _POWER_SCALE * np.maximum(t, 1.0) ** -1.6)


class _FromState:
    """State is the fields."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The stream that `state` described."""
        return cls(**state)


@dataclass(kw_only=True)
class Lord(_FromState):
    """LORD++: online false discovery rate control by p-values.

    Guarantee: at every time the false discovery rate of the stream so far is at most `fdr`, for p-values that are
    independent, each uniform or larger under its null. For dependent ones, such as conformal p-values that share a
    calibration set, use `ELond`.

    Attributes
    ----------
    fdr
        In (0, 1).
    n_tested
        Documents so far.
    discoveries
        Their numbers, from 1, where the null was rejected.

    Examples
    --------
    >>> stream = Lord(fdr=0.1)
    >>> [stream.update(p) for p in (1e-4, 0.7, 1e-3)]
    [True, False, True]
    """

    fdr: float
    n_tested: int = 0
    discoveries: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_fdr(self.fdr)

    @property
    def level(self) -> float:
        """The level of the next test, in (0, 1)."""
        return _lord_level(self.fdr, self.n_tested + 1, np.array(self.discoveries, dtype=np.float64), _lord_spending)

    def update(self, pvalue: float) -> bool:
        """Test the next document at `level`; whether its null is rejected.

        Raises
        ------
        ValueError
            If the p-value is outside [0, 1]; nothing changes.
        """
        rejected = _check_pvalue(pvalue) <= self.level
        self.n_tested += 1
        if rejected:
            self.discoveries.append(self.n_tested)
        return rejected

    def state(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_state` goes on from it, and `Checkpoint` keeps it in a file."""
        return {"fdr": self.fdr, "n_tested": self.n_tested, "discoveries": list(self.discoveries)}


@dataclass(kw_only=True)
class Saffron(_FromState):
    """SAFFRON: as `Lord`, adaptive to the share of true nulls; more discoveries where many documents are marked.

    Guarantee: as `Lord`'s.

    Attributes
    ----------
    fdr, n_tested, discoveries
        As `Lord`.
    cut
        p-values at or below it are candidates and cost nothing, in (0, 1).
    n_candidates
        Candidates so far.
    candidates_at_discovery
        Of them, how many up to and including each discovery.
    """

    fdr: float
    cut: float = 0.5
    n_tested: int = 0
    n_candidates: int = 0
    discoveries: list[int] = field(default_factory=list)
    candidates_at_discovery: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_fdr(self.fdr)
        if not 0.0 < self.cut < 1.0:
            raise ValueError(f"cut must be in (0, 1), got {self.cut}.")

    @property
    def level(self) -> float:
        """The level of the next test, in (0, cut]."""
        # Time runs only while documents are no candidates: from the start, and from each discovery.
        clock = self.n_tested + 1 - self.n_candidates
        begun = np.array(self.discoveries) - np.array(self.candidates_at_discovery)
        wealth = _lord_level(self.fdr, clock, begun.astype(np.float64), _power_spending)
        return min(self.cut, (1.0 - self.cut) * wealth)

    def update(self, pvalue: float) -> bool:
        """As `Lord.update`."""
        rejected = _check_pvalue(pvalue) <= self.level
        self.n_tested += 1
        self.n_candidates += int(pvalue <= self.cut)
        if rejected:
            self.discoveries.append(self.n_tested)
            self.candidates_at_discovery.append(self.n_candidates)
        return rejected

    def state(self) -> dict[str, Any]:
        """As `Lord.state`."""
        kept = {"fdr": self.fdr, "cut": self.cut, "n_tested": self.n_tested, "n_candidates": self.n_candidates}
        lists = {"discoveries": self.discoveries, "candidates_at_discovery": self.candidates_at_discovery}
        return kept | {name: list(values) for name, values in lists.items()}


@dataclass(kw_only=True)
class ELond(_FromState):
    """e-LOND: online false discovery rate control by e-values, whatever their dependence.

    Guarantee: at every time the false discovery rate of the stream so far is at most `fdr`, for e-values with mean at
    most 1 under their nulls, given nothing about their dependence.

    Attributes
    ----------
    fdr, n_tested
        As `Lord`.
    n_discoveries
        Rejections so far.
    """

    fdr: float
    n_tested: int = 0
    n_discoveries: int = 0

    def __post_init__(self) -> None:
        _check_fdr(self.fdr)

    @property
    def level(self) -> float:
        """The level of the next test: its null is rejected where e >= 1 / level."""
        spent = float(_power_spending(np.array([float(self.n_tested + 1)]))[0])
        return self.fdr * spent * (self.n_discoveries + 1)

    def update(self, log_evalue: float) -> bool:
        """Test the next document by the natural logarithm of its e-value; whether its null is rejected.

        Raises
        ------
        ValueError
            If it is nan; nothing changes.
        """
        if math.isnan(log_evalue):
            raise ValueError("log_evalue must be a number, got nan.")
        rejected = log_evalue >= -math.log(self.level)
        self.n_tested += 1
        self.n_discoveries += int(rejected)
        return rejected

    def state(self) -> dict[str, Any]:
        """As `Lord.state`."""
        return {"fdr": self.fdr, "n_tested": self.n_tested, "n_discoveries": self.n_discoveries}


def _lord_level(fdr: float, time: int, discoveries: npt.NDArray[np.float64], spending: Any) -> float:
    """Half the wealth from the start, half when the first discovery is made, all of it at each later one."""
    begun = np.concatenate([[0.0], discoveries])
    wealth = np.full(len(begun), fdr)
    wealth[:2] = fdr / 2
    return float(np.sum(wealth * spending(time - begun)))


def _check_fdr(fdr: float) -> None:
    if not 0.0 < fdr < 1.0:
        raise ValueError(f"fdr must be in (0, 1), got {fdr}.")


def _check_pvalue(pvalue: float) -> float:
    if not 0.0 <= pvalue <= 1.0:
        raise ValueError(f"pvalue must be in [0, 1], got {pvalue}.")
    return pvalue
