"""Exact tail of a sum of independent bounded scores, by exponentially tilted convolution on a lattice.

The sum's law is tilted so that its mean is the observed value, convolved by FFT, and tilted back in log space. The
result is never below the truth; `sum_tail` brackets it. Reference: Keich (2005), sFFT, J. Comput. Biol. 12, 416-430;
Hoeffding (1963), (4.16), for values rounded to the lattice; Higham (2002), Thm 24.2, for the error of an FFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from assay.detection._lattice import sum_law
from assay.kernels.chacha import Words

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Rows = npt.ArrayLike | Sequence[npt.ArrayLike]

CELLS = 2**16
"""Default number of lattice points over the part of the sum's law that matters."""

_UNIT = 2.0**-53
_REACH = 8.5  # standard deviations to either side for which the lattice is laid
_LARGEST = 1e100  # of a value: its square must be far from overflow
_MAX_TILT = 2.0**30  # in units of 1 / (largest possible sum)
# Exponents L of Hoeffding's bound exp(-L) at which the bracket is tried; each gives a bound, so the best of them does.
_EXPONENTS = np.array([2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 18.0, 22.0, 27.0, 33.0, 40.0])


@dataclass(frozen=True)
class SumTail:
    """P(S >= observed) between two proved bounds, as natural logarithms.

    Attributes
    ----------
    log_upper
        Upper bound, in [-inf, 0]; valid as a p-value.
    log_lower
        Lower bound, in [-inf, log_upper].
    """

    log_upper: float
    log_lower: float


def log_sum_sf(
    values: Rows,
    probabilities: Rows,
    observed: float,
    *,
    counts: npt.ArrayLike | None = None,
    cells: int = CELLS,
) -> float:
    """log P(X_1 + ... + X_n >= observed) for independent terms of finite laws, never below the truth.

    Guarantee: at least the true value. The relative excess of the probability is below 1e-6 where all values are
    integers (up to 1e7 terms, as far out as floats describe the logarithm). Elsewhere it is at most what `sum_tail`
    brackets, and shrinks as 1 / cells: for a thousand different coins the bracket is a factor of 1.1 at 1e-22 and of
    1.2 at 1e-93.

    Parameters
    ----------
    values, probabilities
        float64, shape (terms, k), or one sequence per term: what the term may be, and how likely. Rows sum to 1
        within 1e-9 and are normalised; a probability of 0 pads a row.
    observed
        The observed sum; as a float it may have been added in any order.
    counts
        Integers >= 0, shape (terms,): how often each term occurs; default once.
    cells
        Lattice points, at least 16: more is tighter and slower.

    Returns
    -------
    float in [-inf, 0].

    Raises
    ------
    ValueError
        On values that are not finite or above 1e100 in size, probabilities that are negative or do not sum to 1, or
        shapes that do not fit.

    Notes
    -----
    Some tens of milliseconds for a thousand different two-valued terms; identical terms cost less. The lower tail is
    the upper tail of the negated values. Where weights are free to choose, rounding them to integers before the
    statistic is computed leaves nothing to bound.

    Examples
    --------
    >>> round(log_sum_sf([[0, 1]], [[0.5, 0.5]], 400, counts=[400]) / math.log(0.5), 6)
    400.0
    """
    return sum_tail(values, probabilities, observed, counts=counts, cells=cells).log_upper


def log_weighted_count_sf(
    weights: npt.ArrayLike, chances: npt.ArrayLike, observed: float, *, cells: int = CELLS
) -> float:
    """log P(sum_t a_t B_t >= observed) for independent B_t ~ Bernoulli(q_t), never below the truth.

    Parameters
    ----------
    weights
        float64, shape (n,): a_t, finite, of either sign.
    chances
        float64, shape (n,) or one number: q_t in [0, 1].
    observed, cells
        As in `log_sum_sf`.
    """
    a, q = np.asarray(weights, dtype=np.float64), np.asarray(chances, dtype=np.float64)
    if a.ndim != 1 or q.shape not in ((), a.shape):
        raise ValueError(f"weights must have shape (n,) and chances that or none, got {a.shape} and {q.shape}.")
    if not np.all((q >= 0.0) & (q <= 1.0)):
        raise ValueError("chances must be in [0, 1].")
    q = np.broadcast_to(q, a.shape)
    rows = np.stack([np.zeros_like(a), a], axis=1)
    return log_sum_sf(rows, np.stack([1.0 - q, q], axis=1), observed, cells=cells)


def word_score_law(score: Callable[[Words], Floats], unit: float) -> tuple[Counts, Floats]:
    """The exact null law of floor(score(word) / unit), the word uniform on 0 .. 2**32 - 1.

    A score that is rounded before it is summed has an exact law on integers: nothing is left to bound.

    Parameters
    ----------
    score
        Non-increasing function of the word (small words speak for the mark): uint32 (k,) to finite float64 (k,).
    unit
        Size of a level, > 0.

    Returns
    -------
    levels
        int64, shape (k,), ascending by 1.
    probabilities
        float64, shape (k,): multiples of 2**-32, exact.

    Raises
    ------
    ValueError
        If the unit is not positive, or the score is not finite at both ends, increases, or spans over 2**22 units.
    """
    if not unit > 0.0:
        raise ValueError(f"unit must be greater than 0, got {unit}.")
    bottom, top = np.floor(score(np.array([2**32 - 1, 0], dtype=np.uint32)) / unit).tolist()
    if not (math.isfinite(bottom) and bottom <= top <= bottom + 2**22):
        raise ValueError(
            "score must be finite, not increase with the word, and span at most 2**22 units; "
            f"got {top} units at word 0 and {bottom} at word 2**32 - 1."
        )
    levels = np.arange(int(bottom), int(top) + 1, dtype=np.int64)
    # How many words reach each level, by bisection for all levels at once; all words reach the lowest.
    low, high = np.ones(len(levels), dtype=np.int64), np.full(len(levels), 2**32, dtype=np.int64)
    low[0] = 2**32
    while np.any(low < high):
        middle = (low + high + 1) // 2
        reach = np.floor(score((middle - 1).astype(np.uint32)) / unit) >= levels
        low, high = np.where(reach, middle, low), np.where(reach, high, np.maximum(middle - 1, low))
    return levels, -np.diff(low, append=0) * 2.0**-32


def sum_tail(
    values: Rows,
    probabilities: Rows,
    observed: float,
    *,
    counts: npt.ArrayLike | None = None,
    cells: int = CELLS,
) -> SumTail:
    """As `log_sum_sf`, with a proved lower bound beside the upper one.

    Parameters
    ----------
    values, probabilities, observed, counts, cells
        As in `log_sum_sf`.
    """
    terms = _checked(values, probabilities, counts)
    if math.isnan(observed):
        raise ValueError("observed must be a number, got nan.")
    if cells < 16:
        raise ValueError(f"cells must be at least 16, got {cells}.")
    v, n = terms.values, terms.counts
    size = float(n @ np.abs(v).max(axis=1, initial=0.0))
    integral = size < 2.0**52 and bool(np.all(v == np.rint(v)))
    if integral and math.isfinite(observed):
        observed = float(math.ceil(observed))  # the next value that the sum can have
    # Sums of integers are exact; others depend on the order in which they were added, by this much.
    blur = 0.0 if integral else 2.0 * float(n.sum()) * _UNIT * size
    smallest, largest = terms.ends(v)
    if observed - blur <= float(n @ smallest):
        return SumTail(0.0, 0.0 if observed + blur <= float(n @ smallest) else -math.inf)
    if observed - blur > float(n @ largest):
        return SumTail(-math.inf, -math.inf)
    theta = _tilt(terms, observed)
    step = _step(terms, theta, cells, integral=integral)
    k = np.rint(v / step)
    q, log_mean = terms.tilted(k * step, theta)
    # D, the lattice's sum less the true one: its mean, and the squared ranges that Hoeffding's inequality needs.
    moved = k * step - v
    drift = float(n @ np.sum(q * moved, axis=1))
    low_move, high_move = terms.ends(moved)
    spread = float(n @ (high_move - low_move) ** 2)
    law = sum_law(k.astype(np.int64), q, n)
    log_total = float(n @ log_mean)
    exact = integral and step == 1.0

    # P(S >= s) <= P(lattice >= s + E D - d) + P(S >= s, D < E D - d), and the second is below
    # exp(-theta (s + E D - d)) times the tilt's mean times exp(-L), if d = sqrt(L spread / 2) >= theta spread / 4.
    chernoff = float(n @ terms.tilted(v, theta)[1]) - theta * (observed - blur)
    upper, lower = chernoff, -math.inf
    for exponent in _EXPONENTS if spread > 0.0 else [math.inf]:
        margin = math.sqrt(exponent * spread / 2.0) if spread > 0.0 else 0.0
        missed = math.exp(-exponent)
        if 4.0 * margin >= theta * spread:
            threshold = observed + drift - blur - margin
            upper = min(upper, log_total + law.log_tail(theta, step, threshold, missed, 1, exact=exact))
        threshold = observed + drift + blur + margin
        lower = max(lower, log_total + law.log_tail(theta, step, threshold, missed, -1, exact=exact))
    rounding = 8.0 * _UNIT * (float(n @ np.abs(log_mean)) + theta * (abs(observed) + size) + float(n.sum()))
    return SumTail(min(0.0, upper + rounding), min(0.0, lower - rounding))


@dataclass(frozen=True)
class _Terms:
    """Finite laws, shape (terms, k), and how often each occurs."""

    values: Floats
    log_p: Floats
    counts: Floats

    def ends(self, x: Floats) -> tuple[Floats, Floats]:
        """Smallest and largest x of each term, impossible values left out."""
        possible = self.log_p > -math.inf
        return np.where(possible, x, math.inf).min(axis=1), np.where(possible, x, -math.inf).max(axis=1)

    def tilted(self, x: Floats, theta: float) -> tuple[Floats, Floats]:
        """Laws proportional to p exp(theta x), and the logarithm of each factor of proportion."""
        weights = self.log_p + theta * x
        log_mean: Floats = special.logsumexp(weights, axis=1)
        return np.exp(weights - log_mean[:, None]), log_mean


def _checked(values: Rows, probabilities: Rows, counts: npt.ArrayLike | None) -> _Terms:
    v, p = _matrix(values, "values"), _matrix(probabilities, "probabilities")
    if v.shape != p.shape:
        raise ValueError(f"values and probabilities must have the same shape, got {v.shape} and {p.shape}.")
    if not np.all(np.abs(v) <= _LARGEST):
        raise ValueError(f"values must be finite, and at most {_LARGEST:g} in size.")
    totals = p.sum(axis=1)
    if not np.all(p >= 0.0) or not np.all(np.abs(totals - 1.0) <= 1e-9):
        raise ValueError("probabilities must be at least 0 and sum to 1 for each term.")
    c: npt.NDArray[Any] = np.ones(len(v)) if counts is None else np.asarray(counts)
    if c.shape != (len(v),) or not np.all((c >= 0) & (c == np.rint(c)) & (c < 2.0**52)):
        raise ValueError(f"counts must be integers of at least 0, one for each of {len(v)} terms.")
    with np.errstate(divide="ignore"):
        log_p = np.log(p / totals[:, None])
    # A value that cannot occur must not widen the lattice: it takes the place of one that can.
    v = np.where(p > 0.0, v, np.take_along_axis(v, np.argmax(p, axis=1)[:, None], axis=1)) if v.size else v
    v, log_p, n = v[c > 0], log_p[c > 0], c[c > 0].astype(np.float64)
    if len(v) > 1:
        _, first, which = np.unique(np.hstack([v, log_p]), axis=0, return_index=True, return_inverse=True)
        v, log_p, n = v[first], log_p[first], np.bincount(which.ravel(), weights=n).astype(np.float64)
    return _Terms(v, log_p, n)


def _matrix(rows: Rows, name: str) -> Floats:
    """Rows of possibly different lengths as one array, padded with zeros."""
    if not isinstance(rows, np.ndarray):
        parts = [np.asarray(row, dtype=np.float64).tolist() for row in rows]  # type: ignore[union-attr]
        if not parts:
            return np.empty((0, 1))  # no term: the empty sum
        if any(not isinstance(part, list) for part in parts):
            raise ValueError(f"{name} must hold one sequence for each term.")
        rows = np.array(list(zip_longest(*parts, fillvalue=0.0)), dtype=np.float64).T.reshape(len(parts), -1)
    if rows.ndim != 2 or (len(rows) and rows.shape[1] == 0):
        raise ValueError(f"{name} must have shape (terms, k) with k at least 1, got {rows.shape}.")
    return rows.astype(np.float64)


def _tilt(terms: _Terms, observed: float) -> float:
    """theta >= 0 at which the tilted mean is the observed value; 0 where the mean is above it already."""

    def excess(theta: float) -> float:
        q, _ = terms.tilted(terms.values, theta)
        return float(terms.counts @ np.sum(q * terms.values, axis=1)) - observed

    if excess(0.0) >= 0.0:
        return 0.0
    smallest, largest = terms.ends(terms.values)
    gaps = (largest[:, None] - terms.values)[(terms.values < largest[:, None]) & (terms.log_p > -math.inf)]
    top = np.where(terms.values == largest[:, None], terms.log_p, -math.inf).max(axis=1)
    # There every term is at its largest value but for a share of exp(-60).
    # Any tilt gives a bound; one so large that theta times the sum loses its digits gives a poor one.
    size = float(terms.counts @ np.abs(terms.values).max(axis=1))
    limit = min((60.0 - float(top.min())) / float(gaps.min()), _MAX_TILT / size)
    high = min(limit, 1.0 / float(np.max(largest - smallest)))
    while high < limit and excess(high) < 0.0:
        high = min(limit, 2.0 * high)
    return float(optimize.brentq(excess, 0.0, high, rtol=1e-7)) if excess(high) > 0.0 else high


def _step(terms: _Terms, theta: float, cells: int, *, integral: bool) -> float:
    """Distance of the lattice points: 1 for integers, unless that would take too many."""
    q, _ = terms.tilted(terms.values, theta)
    mean = np.sum(q * terms.values, axis=1)
    deviation = math.sqrt(float(terms.counts @ np.sum(q * (terms.values - mean[:, None]) ** 2, axis=1)))
    smallest, largest = terms.ends(terms.values)
    ranges = largest - smallest
    window = min(float(terms.counts @ ranges), 2.0 * _REACH * deviation + 2.0 * float(ranges.max()))
    return 1.0 if integral and window <= 64.0 * cells else window / cells
