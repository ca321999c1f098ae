"""Goodness-of-fit tests of Gumbel pivots, for edited text: Berk-Jones and truncated phi-divergences, exact for every n.

Under H0 the ordered R = (word + 1) / 2**32 lie above those of n uniforms; a mark pushes some of them towards 0. The
p-value is the chance that a uniform sample crosses a boundary. Reference: Berk and Jones (1979); Donoho and Jin (2004);
Jager and Wellner (2007), arXiv:math/0603238, for the family; Li et al. (2024), arXiv:2411.13868, for watermarks.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.detection.result import TestResult
from assay.watermark.gumbel import Pivots, sum_scores

Floats = npt.NDArray[np.float64]

NULL = "the text was written without knowledge of the key"
ASSUMPTIONS = (
    "The key was secret: whoever wrote an unmarked text could not compute its PRF.",
    "Each distinct (context, token) counts once, at its first place.",
)

_ROUNDING = 1e-8  # added to the log p-value: more than the recursion's rounding errors
_SMALLEST = -1500.0  # log of the smallest boundary that is searched for orders below 1


def log_crossing_probability(log_bounds: npt.ArrayLike) -> float:
    """log P(U_(i) <= b_i for some i), U_(1) <= ... <= U_(n) the ordered sample of n independent uniforms.

    Guarantee: not below the truth, and above it by a relative error below 2e-8 for n up to 10,000.

    Parameters
    ----------
    log_bounds
        float64, shape (n,): log b_i in [-inf, 0]; where b_i < b_{i-1} the bound b_{i-1} says it all.

    Returns
    -------
    float in [-inf, 0].

    Raises
    ------
    ValueError
        If a bound is NaN or above 0.

    Notes
    -----
    O(n^2): 0.2 s for n = 5,000. Split by the last i with U_(i) <= b_i: exactly i points then lie below b_i, and the
    others never cross again. Their chance g_i obeys g_i = 1 - sum_{k > i} P(k - i of the n - i later points lie in
    (b_i, b_k]) g_k. The probability wanted, sum_i P(i points below b_i) g_i, adds positive terms only.
    """
    bounds = np.asarray(log_bounds, dtype=np.float64)
    if bounds.ndim != 1 or np.any(np.isnan(bounds)) or np.any(bounds > 0.0):
        raise ValueError("log_bounds must have shape (n,) and lie in [-inf, 0].")
    n = len(bounds)
    if n == 0 or bounds.max() == -math.inf:
        return -math.inf
    if bounds.max() == 0.0:
        return 0.0  # U_(i) <= 1 always
    log_b = np.concatenate([[-math.inf], np.maximum.accumulate(bounds)])  # (n + 1,), the first one is no bound
    # log(1 - b) without loss where b is near 1, or so near that exp gives 1.
    log_rest = np.where(log_b < -0.7, np.log1p(-np.exp(np.minimum(log_b, -0.7))), np.log(-np.expm1(log_b)))
    log_factorial = special.gammaln(np.arange(n + 1) + 1.0)
    log_g = np.zeros(n + 1)
    out = -math.inf
    for i in range(n - 1, -1, -1):
        k = np.arange(i + 1, n + 1)
        # b_k - b_i relative to b_k; a bound that does not grow has no points between.
        grows = log_b[i + 1 :] > log_b[i]
        log_width = np.full(n - i, -math.inf)
        later = log_b[i + 1 :][grows]
        log_width[grows] = later + np.log(-np.expm1(log_b[i] - later))
        chance = (
            (log_factorial[n - i] - log_factorial[k - i] - log_factorial[n - k])
            + (k - i) * (log_width - log_rest[i])
            + (n - k) * (log_rest[i + 1 :] - log_rest[i])
            + log_g[i + 1 :]
        )
        if i == 0:
            out = float(special.logsumexp(chance))
        else:
            with np.errstate(divide="ignore"):
                log_g[i] = np.log(max(0.0, 1.0 - float(np.exp(chance).sum())))
    return min(0.0, out + _ROUNDING)


def divergence(share: Floats, r: Floats, order: float) -> Floats:
    """K_s^+(u, v) of Jager and Wellner: how far the share u of points at most v exceeds v; 0 where it does not.

    Parameters
    ----------
    share
        float64: u in [0, 1].
    r
        float64, same shape: v in (0, 1].
    order
        s in (0, 2]. 1: u log(u / v) + (1 - u) log((1 - u) / (1 - v)); 2: (u - v)^2 / (2 v (1 - v)).
    """
    u, v = share, np.minimum(r, share)  # where v >= u the divergence is that of v = u: zero
    if order == 1.0:
        return np.asarray(special.rel_entr(u, v) + special.rel_entr(1.0 - u, 1.0 - v))
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.where(u < 1.0, (1.0 - u) ** order * (1.0 - v) ** (1.0 - order), 0.0)
    grown = np.exp(order * np.log(u) + (1.0 - order) * np.log(v)) + rest
    out: Floats = np.maximum(0.0, np.where(v < u, (grown - 1.0) / (order * (order - 1.0)), 0.0))
    return out


def berk_jones_test(pivots: Pivots) -> TestResult:
    """The test of Berk and Jones: the largest binomial surprise over all shares of small R, with an exact p-value.

    As `divergence_test` of order 1 without truncation. It adapts to the share of tokens that an editor has left, and
    to how strong the mark is on them.
    """
    return divergence_test(pivots, order=1.0, name="gumbel-berk-jones")


def divergence_test(
    pivots: Pivots, *, order: float = 2.0, truncate: float | None = None, name: str = "gumbel-divergence"
) -> TestResult:
    """Truncated phi-divergence test: T = n sup over v in [c, 1] of K_s^+(F_n(v), v), with an exact p-value.

    Guarantee: P(pvalue <= a) <= a for every a, for every text written without the key; no assumption on the text.

    Parameters
    ----------
    pivots
        The document's pivots.
    order
        s in (0, 2]: 1 is Berk-Jones, 2 the higher criticism.
    truncate
        c in [0, 1): R below c count as c, so that one tiny R does not decide. Default 1 / n for orders above 1, where
        it would, and 0 otherwise.
    name
        Of the result.

    Returns
    -------
    TestResult; its e-value is calibrated from p: the mean over k in (0, 1) of k p^(k - 1).

    Raises
    ------
    ValueError
        If order or truncate is out of range.

    Notes
    -----
    O(n^2) time, O(n) memory.
    """
    if not 0.0 < order <= 2.0:
        raise ValueError(f"order must be in (0, 2], got {order}.")
    if truncate is not None and not 0.0 <= truncate < 1.0:
        raise ValueError(f"truncate must be in [0, 1), got {truncate}.")
    n = len(pivots.words)
    statistic, log_p = 0.0, 0.0
    if n:
        cut = truncate if truncate is not None else (1.0 / n if order > 1.0 else 0.0)
        share = np.arange(1, n + 1) / n
        r = np.maximum(np.exp(-np.sort(sum_scores(pivots.words))[::-1]), cut)
        statistic = n * float(np.max(divergence(share, r, order)))
        if statistic > 0.0:
            bounds = _log_bounds(share, statistic / n, order)
            # Below the cut R counts as the cut: it crosses there or not at all.
            bounds[bounds < (math.log(cut) if cut > 0.0 else -math.inf)] = -math.inf
            log_p = log_crossing_probability(bounds)
    return TestResult(
        test=name,
        statistic=statistic,
        log_pvalue=log_p,
        log_evalue=log_calibrated(log_p) if n else 0.0,
        n_tokens=pivots.n_tokens,
        n_scored=n,
        n_repeats_dropped=pivots.n_repeats_dropped,
        null=NULL,
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )


def log_calibrated(log_pvalue: float) -> float:
    """log of the e-value (1 - p + p log p) / (p log^2 p), the mean of k p^(k - 1) over k in (0, 1).

    Its mean is at most 1 where P(p <= a) <= a, as each k p^(k - 1) decreases in p and integrates to 1. Reference: Vovk
    and Wang (2021), arXiv:1912.06116, section 2.

    Parameters
    ----------
    log_pvalue
        Natural logarithm, in [-inf, 0].
    """
    x = -log_pvalue
    if x == math.inf:
        return math.inf
    if x < 1e-2:
        return math.log(0.5 + x / 6.0 + x * x / 24.0)  # the series of the same
    return x + math.log(-math.expm1(-x) - x * math.exp(-x)) - 2.0 * math.log(x)


def _log_bounds(share: Floats, level: float, order: float) -> Floats:
    """log of the largest v with K_s^+(u, v) >= level for each u, rounded up; -inf where there is none."""
    if order == 1.0:
        low = np.log(share) - (level + 0.4) / share  # K >= u log(u / v) - 1 / e
    elif order > 1.0:
        low = (order * np.log(share) - math.log1p(order * (order - 1.0) * level)) / (order - 1.0)
    else:
        low = np.full(len(share), _SMALLEST)
    high = np.log(share)
    for _ in range(64):
        middle = 0.5 * (low + high)
        reaches = _divergence_at(share, middle, order) >= level
        low, high = np.where(reaches, middle, low), np.where(reaches, high, middle)
    if order < 1.0:
        possible = (1.0 - (1.0 - share) ** order) / (order * (1.0 - order))
        high[possible < level] = -math.inf
    bounds: Floats = np.minimum(high + 1e-12, 0.0)
    return bounds


def _divergence_at(share: Floats, log_r: Floats, order: float) -> Floats:
    """`divergence` for v = exp(log_r), which may be below the smallest float."""
    v = np.exp(log_r)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if order == 1.0:
            return np.asarray(
                share * (np.log(share) - log_r)
                + np.where(share < 1.0, (1.0 - share) * (np.log1p(-share) - np.log1p(-v)), 0.0)
            )
        rest = np.where(share < 1.0, (1.0 - share) ** order * (1.0 - v) ** (1.0 - order), 0.0)
        grown = np.exp(order * np.log(share) + (1.0 - order) * log_r) + rest
        return np.asarray((grown - 1.0) / (order * (order - 1.0)))
