"""Calibration-conditional p-values: bounds on the order statistics of uniforms that hold all at once.

With n calibration scores the chance that a new human text outranks all but i - 1 of them is U_(i), the i-th smallest of
n uniforms. If U_(i) <= b_i for all i, replacing the marginal p-value i / (n + 1) by b_i makes P(p <= a | calibration
texts) <= a for all a. Reference: Bates et al. (2023), section 3, arXiv:2104.08279; Sarkar (2008) for the inequality.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Floats = npt.NDArray[np.float64]

_AT_ONCE = 1 << 22  # simulated uniforms held at once: 32 MiB


def simes_bounds(n: int, confidence: float, k: int | None = None) -> Floats:
    """Bounds by the generalised Simes inequality.

    Guarantee: P(U_(i) <= b_i for all i) >= confidence, for the order statistics of n independent uniforms.

    Parameters
    ----------
    n
        Calibration texts, >= 1.
    confidence
        In (0, 1).
    k
        Order of the inequality, in [1, n]; default ceil(n / 2), which Bates et al. recommend. The k - 1 largest bounds
        are 1.

    Returns
    -------
    float64, shape (n + 1,), ascending: b_1 .. b_n and a last 1 for a text that outranks none.

    Notes
    -----
    b_(n+1-i) = 1 - delta^(1/k) ((i ... (i-k+1)) / (n ... (n-k+1)))^(1/k), delta = 1 - confidence (their equation 9).
    """
    order = -(-n // 2) if k is None else k
    if not 1 <= order <= n:
        raise ValueError(f"k must be in [1, n = {n}], got {k}.")
    i = np.arange(n, 0, -1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        falling = special.gammaln(i + 1) - special.gammaln(i - order + 1)
    whole = special.gammaln(n + 1.0) - special.gammaln(n - order + 1.0)
    inner = np.where(i >= order, (np.log1p(-confidence) + falling - whole) / order, -np.inf)
    return np.append(-np.expm1(inner), 1.0)


def monte_carlo_bounds(n: int, confidence: float, *, simulations: int, rng: np.random.Generator) -> Floats:
    """Bounds that each hold with the same probability, which is fitted so that they hold together.

    Guarantee: P(U_(i) <= b_i for all i) >= confidence over the uniforms and the simulations together, for any number of
    simulations: the real smallest tail probability is exchangeable with the simulated ones.

    Parameters
    ----------
    n, confidence
        As in `simes_bounds`.
    simulations
        Simulated calibrations, >= 1 / (1 - confidence) - 1, or the guarantee needs b_i = 1.
    rng
        Source of the simulated uniforms.

    Returns
    -------
    float64, shape (n + 1,), as `simes_bounds`.

    Notes
    -----
    b_i is the 1 - g quantile of Beta(i, n + 1 - i), g the floor((1 - confidence) (simulations + 1))-th smallest of
    min_i P(Beta(i, n + 1 - i) > U_(i)). O(n * simulations).
    """
    ranks = np.arange(1, n + 1, dtype=np.float64)
    smallest = np.empty(simulations)
    step = max(1, _AT_ONCE // n)
    for start in range(0, simulations, step):
        count = min(step, simulations - start)
        uniforms = np.sort(rng.random((count, n)), axis=1)
        tails = special.betaincc(ranks, n + 1 - ranks, uniforms)
        smallest[start : start + count] = tails.min(axis=1)
    kept = int(np.floor((1.0 - confidence) * (simulations + 1) + 1e-9))
    if kept < 1:
        raise ValueError(
            f"simulations must be at least {int(np.ceil(1 / (1 - confidence))) - 1} for confidence {confidence}, got "
            f"{simulations}."
        )
    tail = np.partition(smallest, kept - 1)[kept - 1]
    return np.append(stats.beta.isf(tail, ranks, n + 1 - ranks), 1.0)


def false_positive_bound(flagged: int, n: int, confidence: float = 0.95) -> float:
    """Clopper-Pearson upper bound on the rate of false positives at a fixed threshold.

    Guarantee: P(true rate <= bound) >= confidence, if the threshold was chosen without the n texts and these are
    independent draws of the human texts that the rate is about.

    Parameters
    ----------
    flagged
        Human texts at or past the threshold, in [0, n].
    n
        Human texts, >= 1.
    confidence
        In (0, 1).
    """
    if n < 1 or not 0 <= flagged <= n:
        raise ValueError(f"flagged must be in [0, n] with n >= 1, got {flagged} of {n}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}.")
    return 1.0 if flagged == n else float(stats.beta.ppf(confidence, flagged + 1, n - flagged))
