"""The likelihood ratio of a whole green list: probability of a token under the key over its mean over all keys.

1 / (c + a G) is the integral of exp(-v (c + a G)) over v > 0, and over independent colours the mean of exp(-v a G) is
the product of 1 - gamma + gamma exp(-v a p_u). With v = e^y the trapezoidal rule converges geometrically.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from assay._compiled import compiled
from assay.kernels import tilts
from assay.kernels.chacha import Words
from assay.kernels.race import LogWeights
from assay.kernels.tilted_laws import _law, _place

# The integrand is a mixture of y -> exp(y - m e^y), analytic for |Im y| < pi / 2: the relative error of the rule is
# about 2 exp(-pi**2 / step), 5e-11 here. The last factor covers it, so that the mean of a ratio is never above 1.
_STEP = 0.4
_MARGIN = 1.0 + 1e-9
# Candidates below this share enter the product through an upper bound that is exact to the second order.
_SMALL = 1e-3


@compiled()
def _log_small(v, share, first, second, third, largest):
    """An upper bound of sum log(1 - share (1 - exp(-v p))) over candidates with sums of powers first, second, third.

    With f(s) = log(1 - share (1 - exp(-s))): f(s) <= -share s + share (1 - share) s**2 / 2 + share**2 s**3 / 2 for
    s <= 2, and f(s) / s increases, so that f(s) <= s f(t) / t for s <= t.
    """
    if first <= 0.0:
        return 0.0
    top = v * largest
    bound = first / largest * np.log1p(share * np.expm1(-top))
    if top <= 2.0:
        fine = -share * v * first + 0.5 * share * (1.0 - share) * v**2 * second + 0.5 * share**2 * v**3 * third
        bound = min(bound, fine)
    return bound


@compiled()
def _mean_ratio(weight, count, where, share, bonus):
    """E over colours of (1 + bonus g) / (1 + bonus G) from above; g of candidate `where`, G the green mass."""
    own = weight[where]
    large = np.empty(count, np.float64)
    size = 0
    first = 0.0
    second = 0.0
    third = 0.0
    largest = 0.0
    for j in range(count):
        p = weight[j]
        if j == where:
            continue
        if p >= _SMALL:
            large[size] = p
            size += 1
        else:
            first += p
            second += p * p
            third += p * p * p
            largest = max(largest, p)
    low = -30.0 - np.log1p(bonus)
    nodes = int((4.0 - low) / _STEP) + 1
    total = 0.0
    for k in range(nodes):
        y = low + _STEP * k
        v = np.exp(y)
        log_product = _log_small(v * bonus, share, first, second, third, largest)
        for j in range(size):
            log_product += np.log1p(share * np.expm1(-v * bonus * large[j]))
        red = (1.0 - share) * np.exp(y - v + log_product)
        green = share * (1.0 + bonus) * np.exp(y - v * (1.0 + bonus * own) + log_product)
        total += _STEP * (red + green)
    return total * _MARGIN


@compiled()
def _green_log_ratios(keys, log_rows, tokens, stream, threshold, bonus, out):
    vocabulary = log_rows.shape[1]
    index = np.empty(vocabulary, np.int64)
    weight = np.empty(vocabulary, np.float64)
    words = np.empty(vocabulary, np.uint32)
    share = np.float64(threshold) * 2.0**-32
    for i in range(log_rows.shape[0]):
        out[i] = 0.0
        count = _law(log_rows[i], index, weight)
        where = _place(index, count, tokens[i])
        if where < 0:
            continue
        tilts.words_of(keys[i], stream, index, count, words)
        mass = 0.0
        for j in range(count):
            mass += weight[j] if words[j] < threshold else 0.0
        log_tilted = (np.log1p(bonus) if words[where] < threshold else 0.0) - np.log1p(bonus * mass)
        out[i] = log_tilted - np.log(_mean_ratio(weight, count, where, share, bonus))


def green_log_ratios(
    keys: Words, log_rows: LogWeights, tokens: npt.NDArray[np.int64], *, stream: int, threshold: int, delta: float
) -> npt.NDArray[np.float64]:
    """log of (probability of the token under its key's list / mean of that over all keys).

    Guarantee: over uniform keys exp of it has mean at most 1; it falls short of 1 by less than 1e-5 for delta up to 3,
    and by what the bound on rare candidates loses above.

    Parameters
    ----------
    keys
        uint32, shape (n, 8): subkeys of the lists.
    log_rows
        float32 or float64, shape (n, V): log-probabilities.
    tokens
        int64, shape (n,).
    stream, threshold
        As in `tilted_race.green_winners`.
    delta
        Bonus on the log-probability of green candidates, in (0, 20].

    Returns
    -------
    float64, shape (n,); 0 where the law gives the token no probability.

    Notes
    -----
    About 100 nodes times the candidates above a thousandth, of which there are at most a thousand.
    """
    out = np.empty(len(log_rows), dtype=np.float64)
    rows = np.ascontiguousarray(log_rows)
    _green_log_ratios(keys, rows, tokens, np.uint32(stream), np.uint64(threshold), math.expm1(delta), out)
    return out
