"""How good intervals were: coverage, width, and the interval score that weighs one against the other.

Compare methods by coverage and interval score together: width alone rewards those that miss.
Source: Winkler (1972), JASA 67, 187-191; Gneiting and Raftery (2007), JASA 102, section 6.2.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from assay.conformal._arrays import Bools, Floats


def covered(y: npt.ArrayLike, intervals: npt.ArrayLike) -> Bools:
    """Whether each truth lies in its interval, ends included.

    Parameters
    ----------
    y
        Finite, shape (n,), n >= 1.
    intervals
        Shape (n, 2), or (n, 2, k) as the methods give them, lower ends first; ends may be infinite.

    Returns
    -------
    bool, shape (n, k), with k = 1 for two-dimensional intervals.

    Raises
    ------
    ValueError
        On NaN, wrong shapes, or a lower end above its upper end.
    """
    truth, ends = check_intervals(y, intervals)
    return np.asarray((ends[:, 0] <= truth[:, None]) & (truth[:, None] <= ends[:, 1]))


def coverage(y: npt.ArrayLike, intervals: npt.ArrayLike) -> Floats:
    """Share of truths inside their intervals, float64, shape (k,); arguments as in `covered`."""
    return np.asarray(covered(y, intervals).mean(axis=0))


def mean_width(intervals: npt.ArrayLike) -> Floats:
    """Mean width of the intervals.

    Parameters
    ----------
    intervals
        As in `covered`.

    Returns
    -------
    float64, shape (k,), at least 0; inf where an interval is infinite.

    Raises
    ------
    ValueError
        On NaN, wrong shapes, or a lower end above its upper end.
    """
    ends = check_intervals(np.zeros(len(np.asarray(intervals))), intervals)[1]
    return np.asarray((ends[:, 1] - ends[:, 0]).mean(axis=0))


def winkler_score(y: npt.ArrayLike, intervals: npt.ArrayLike, alpha: float | npt.ArrayLike) -> Floats:
    """Mean of width plus (2 / alpha) times the distance by which a truth is missed; lower is better.

    The true quantiles at alpha / 2 and 1 - alpha / 2 minimise its expectation.

    Parameters
    ----------
    y, intervals
        As in `covered`.
    alpha
        The level of each of the k intervals, in (0, 1).

    Returns
    -------
    float64, shape (k,).
    """
    truth, ends = check_intervals(y, intervals)
    levels = np.atleast_1d(np.asarray(alpha, dtype=np.float64))
    if levels.shape != (ends.shape[2],) or not ((levels > 0) & (levels < 1)).all():
        raise ValueError(f"alpha must be {ends.shape[2]} levels in (0, 1), one for each interval, got {alpha!r}.")
    below = np.maximum(ends[:, 0] - truth[:, None], 0)
    above = np.maximum(truth[:, None] - ends[:, 1], 0)
    return np.asarray((ends[:, 1] - ends[:, 0] + 2 / levels * (below + above)).mean(axis=0))


def rolling_coverage(y: npt.ArrayLike, intervals: npt.ArrayLike, window: int = 100) -> Floats:
    """Coverage over each `window` consecutive rows, float64, shape (n - window + 1, k).

    Raises
    ------
    ValueError
        If the window is not in 1..n.
    """
    return rolling_share(covered(y, intervals), window)


def rolling_share(hits: Bools, window: int) -> Floats:
    """Share of hits (n, k) among each `window` consecutive rows, float64, shape (n - window + 1, k)."""
    if not 1 <= window <= len(hits):
        raise ValueError(f"window must be in 1..{len(hits)}, the number of rows, got {window}.")
    sums = np.concatenate([np.zeros((1, hits.shape[1])), np.cumsum(hits, axis=0)])
    return np.asarray((sums[window:] - sums[:-window]) / window)


def standard_error(share: float, n: int) -> float:
    """Binomial standard error of a share of n rows, sqrt(share (1 - share) / n); too small if misses cluster."""
    return math.sqrt(share * (1 - share) / n)


def check_intervals(y: npt.ArrayLike, intervals: npt.ArrayLike) -> tuple[Floats, Floats]:
    """The truth (n,) and the intervals (n, 2, k) as float64; refuses what `covered` refuses."""
    truth = np.asarray(y, dtype=np.float64)
    ends = np.asarray(intervals, dtype=np.float64)
    if ends.ndim == 2:
        ends = ends[:, :, None]
    if truth.ndim != 1 or len(truth) == 0 or not np.isfinite(truth).all():
        raise ValueError(f"y must be finite numbers, shape (n,) with n >= 1, got shape {truth.shape}.")
    if ends.ndim != 3 or ends.shape[:2] != (len(truth), 2):
        raise ValueError(f"intervals must have shape ({len(truth)}, 2) or ({len(truth)}, 2, k), got {ends.shape}.")
    if not (ends[:, 0] <= ends[:, 1]).all():
        raise ValueError("intervals must have lower ends at most their upper ends, and no NaN.")
    return truth, ends
