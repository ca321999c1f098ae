"""The green list with independent membership: how often a token is green, and the power of the exact binomial test.

Under H0 each counted token is green with chance gamma, independently. Source: Kirchenbauer et al. (2023),
arXiv:2301.10226, section 4.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from assay.watermark._laws import check_law, check_level, group_law


def green_chance(law: npt.ArrayLike, gamma: float = 0.25, delta: float = 2.0) -> float:
    """Chance that a marked token is green: E of e^delta G / (1 + (e^delta - 1) G), G the random mass of the green set.

    Parameters
    ----------
    law
        float64, shape (V,): the model's law of the token.
    gamma
        Chance that a token of the vocabulary is green, each independently of the others, in (0, 1).
    delta
        Bonus on the logits of green tokens, > 0; infinite for the hard list (which draws from the law itself where no
        token of positive probability is green).

    Returns
    -------
    Between gamma and 1; absolute error below 1e-12 for any V, without enumeration of green sets.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    1 / (1 + a G) is the integral of exp(-v (1 + a G)) over v > 0, and E exp(-v a G) is a product over tokens. With
    v = e^y the integrand is analytic and falls off on both sides: the trapezoidal rule is exact to rounding.
    """
    share = check_level(gamma, "gamma")
    if not delta > 0.0:
        raise ValueError(f"delta must be greater than 0, got {delta}.")
    log_p, multiplicity = group_law(check_law(law, "law"))
    if delta > 700.0:  # infinite to double precision
        return -math.expm1(int(multiplicity.sum()) * math.log1p(-share))
    bonus = math.expm1(delta)
    step = 0.05
    y = np.arange(-40.0, 4.0 + step, step)
    v = np.exp(y)
    log_product = np.zeros(len(y))
    for log_mass, count in zip(log_p, multiplicity, strict=True):
        log_product += count * np.log1p(share * np.expm1(-bonus * np.exp(log_mass) * v))
    # E of a G / (1 + a G), without the cancellation of one minus its complement where the bonus is small.
    tilted = math.fsum(step * np.exp(y - v) * -np.expm1(log_product))
    return min(1.0, (1.0 + 1.0 / bonus) * tilted)


def green_chances(laws: npt.ArrayLike, gamma: float = 0.25, delta: float = 2.0) -> npt.NDArray[np.float64]:
    """`green_chance` of many laws at once, for the laws of a model's tokens.

    Parameters
    ----------
    laws
        float64, shape (n, V): one law per row.
    gamma, delta
        As in `green_chance`.

    Returns
    -------
    float64, shape (n,). Relative error below 1e-4: probabilities within 5 % of each other are merged into their mean,
    which moves the exponents in the integral by their variance only.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    share = check_level(gamma, "gamma")
    if not delta > 0.0:
        raise ValueError(f"delta must be greater than 0, got {delta}.")
    table = np.asarray(laws, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"laws must have shape (n, V), got {table.shape}.")
    table = np.array([check_law(row, f"laws[{t}]") for t, row in enumerate(table)]).reshape(table.shape)
    if delta > 700.0:
        hard: npt.NDArray[np.float64] = -np.expm1(np.count_nonzero(table, axis=1) * math.log1p(-share))
        return hard
    bonus = math.expm1(delta)
    y = np.arange(-20.0, 4.0, 0.25)
    v = np.exp(y)
    # Below this the factor of a token is linear in its probability, and one cell will do for all.
    floor = math.log(1e-5 / max(bonus, 1.0))
    cells = 2 + int(-floor / 0.05)
    with np.errstate(divide="ignore"):
        cell = np.clip((np.log(table) - floor) / 0.05 + 1.0, 0.0, cells - 1.0).astype(np.int64)
    row = np.arange(len(table))[:, None] * cells
    count = np.bincount((row + cell).ravel(), (table > 0.0).ravel(), len(table) * cells)
    mass = np.bincount((row + cell).ravel(), table.ravel(), len(table) * cells)
    used = np.flatnonzero(count)
    factors = count[used, None] * np.log1p(share * np.expm1(-bonus * (mass[used] / count[used])[:, None] * v))
    bounds = np.searchsorted(used, np.arange(len(table)) * cells)
    log_product = np.add.reduceat(factors, bounds, axis=0) if len(table) else np.empty((0, len(v)))
    tilted = (0.25 * np.exp(y - v)) @ -np.expm1(log_product).T
    out: npt.NDArray[np.float64] = np.minimum(1.0, (1.0 + 1.0 / bonus) * tilted)
    return out


def last_kept(n: npt.ArrayLike, gamma: float, alpha: float) -> npt.NDArray[np.int64]:
    """The largest green count that the exact test of level alpha does not reject, elementwise in n."""
    # Not scipy's binom.isf, which goes through 1 - alpha and returns n for every alpha below 1e-16.
    high = np.array(n, dtype=np.int64)
    low = np.full_like(high, -1)
    while np.any(high - low > 1):
        middle = (low + high) // 2
        enough = stats.binom.sf(middle, n, gamma) <= alpha
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


def binomial_type2_error(n: int, gamma: float, chance: float, alpha: float) -> float:
    """Type II error of the exact test of n green indicators: gamma under H0, chance under H1."""
    return float(stats.binom.cdf(last_kept(n, gamma, alpha), n, chance))


def smallest_binomial(gamma: float, chance: float, alpha: float, beta: float, limit: int) -> int:
    """The smallest n at which the exact test's Type II error is at most beta.

    The randomised test's error falls with n and is never larger, so its crossing, found by bisection, is a lower bound
    from which every n is tried: the error of the test without randomisation is a saw-tooth.
    """

    def randomised(n: int) -> float:
        last = int(last_kept(n, gamma, alpha))
        edge = stats.binom.pmf(last, n, gamma)
        spent = min(1.0, (alpha - stats.binom.sf(last, n, gamma)) / edge) if edge > 0.0 else 1.0
        return float(stats.binom.cdf(last, n, chance) - spent * stats.binom.pmf(last, n, chance))

    high = 1
    while randomised(high) > beta:
        high *= 2
        if high > limit:
            raise ValueError(f"beta = {beta} needs more than {limit} tokens. Use a larger delta or another test.")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if randomised(middle) <= beta else (middle, high)
    while True:
        lengths = np.arange(high, high + 64)
        good = stats.binom.cdf(last_kept(lengths, gamma, alpha), lengths, chance) <= beta
        if good.any():
            return high + int(np.argmax(good))
        high += 64
