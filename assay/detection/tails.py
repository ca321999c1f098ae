"""Exact tails of the null laws, in log space: Gamma for unweighted sums, weighted sums of exponentials for weighted.

Both are accurate far below the smallest float. Reference for the contour: Daniels (1954), saddlepoint; Weideman and
Trefethen (2007), hyperbolic contours for Laplace inversion; the sum's transform is 1 / (z prod(1 + w_t z)).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

_TINY = 1e-300
_KAPPA = 0.5
_LOG_UNDERFLOW = math.log(1e-200)  # below this the incomplete gamma function loses digits


def log_gamma_sf(n: npt.NDArray[np.int64], s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log P(G >= s) for G ~ Gamma(n, 1), the sum of n independent Exp(1); elementwise.

    Parameters
    ----------
    n
        int64, any shape: number of terms, >= 0; the empty sum is 0.
    s
        float64, same shape: observed sums, >= 0.

    Returns
    -------
    float64, same shape, in [-inf, 0]; relative error of the probability below 1e-8 for n up to 1e7.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.log(special.gammaincc(n, s))
    out = np.where(s <= 0.0, 0.0, np.where(n == 0, -np.inf, out))
    for i in np.flatnonzero(out < _LOG_UNDERFLOW):
        if n.flat[i] > 0 and np.isfinite(s.flat[i]):
            out.flat[i] = _log_gamma_sf_far(int(n.flat[i]), float(s.flat[i]))
    return np.minimum(out, 0.0)


def _log_gamma_sf_far(n: int, s: float) -> float:
    """The same far out, where the probability itself underflows; needs s > n."""
    # Legendre's continued fraction by the modified Lentz algorithm, which converges fast for s > n.
    b = s + 1.0 - n
    c = 1.0 / _TINY
    d = 1.0 / b
    fraction = d
    for i in range(1, 100_000):
        a = -i * (i - n)
        b += 2.0
        d = 1.0 / (a * d + b or _TINY)
        c = b + a / c or _TINY
        step = c * d
        fraction *= step
        if abs(step - 1.0) < 1e-15:
            break
    return _log_gamma_kernel(n, s) + math.log(fraction)


def _log_gamma_kernel(n: int, s: float) -> float:
    """n log s - s - log Gamma(n): for large n without the cancellation of terms of the size n log n."""
    if n < 32:
        return n * math.log(s) - s - math.lgamma(n)
    # Stirling's series of log Gamma(n); the first omitted term is below 1e-17.
    series = 1.0 / (12.0 * n) - 1.0 / (360.0 * n**3) + 1.0 / (1260.0 * n**5) - 1.0 / (1680.0 * n**7)
    excess = (s - n) / n
    return n * (math.log1p(excess) - excess) + 0.5 * math.log(n / (2.0 * math.pi)) - series


def log_weighted_exponential_cdf(weights: npt.NDArray[np.float64], s: float) -> float:
    """log P(sum_t w_t E_t <= s) for independent E_t ~ Exp(1).

    Parameters
    ----------
    weights
        float64, shape (n,), all > 0 and finite.
    s
        Observed sum, >= 0.

    Returns
    -------
    float in [-inf, 0], relative error of the probability below 1e-6 (checked against exact inversion to 1e-300).

    Raises
    ------
    ValueError
        If a weight is not positive and finite, or s is negative or NaN.
    ArithmeticError
        If the quadrature does not settle; never seen, and never answered with a guess.

    Notes
    -----
    The Bromwich integral of exp(z s) / (z prod(1 + w_t z)) on a hyperbola through the real saddlepoint; all
    singularities lie on the negative axis, so the trapezoidal rule converges geometrically. O(n) per node, some
    hundred nodes.
    """
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or not np.all(np.isfinite(w)) or not np.all(w > 0):
        raise ValueError("weights must be a one-dimensional array of positive finite numbers.")
    if math.isnan(s) or s < 0:
        raise ValueError(f"s must be at least 0, got {s}.")
    if s == math.inf or len(w) == 0:
        return 0.0
    if s == 0.0:
        return -math.inf
    # In units of s the saddlepoint is a pure number between 1/2 (all mass below s) and n + 1 (deep lower tail).
    w = w / s
    n = len(w)

    def slope(log_z: float) -> float:
        z = math.exp(log_z)
        # z * phi'(z) for phi(z) = z - log z - sum log(1 + w z); increasing in z.
        return z - 1.0 - float(np.sum(w * z / (1.0 + w * z)))

    theta = math.exp(optimize.brentq(slope, math.log(0.5), math.log(n + 2.0), xtol=1e-13, rtol=1e-14))
    ratio = w / (1.0 + w * theta)
    second = 1.0 / theta**2 + float(np.sum(ratio**2))
    third = -2.0 / theta**3 - 2.0 * float(np.sum(ratio**3))
    scale = 1.0 / math.sqrt(second)
    peak = theta - math.log(theta) - float(np.sum(np.log1p(w * theta)))
    # A hyperbola through theta with the curvature of steepest descent and asymptotes of slope KAPPA. For slopes up to 1
    # every factor exp(a m) / (1 + a m), m = z - theta, shrinks monotonically along the wedge, so nothing blows up
    # near the poles -1 / w_t; a parabola would run into them when n is large.
    arm = _KAPPA * 3.0 * second / -third

    def integrand(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        y = scale * t
        root = np.hypot(y, arm)
        move = -_KAPPA * (root - arm) + 1j * y
        # Relative to the peak: sums of small complex logarithms keep their digits where the peak is -1e6.
        exponent = move - np.log1p(move / theta)
        for start in range(0, n, 4096):
            exponent -= np.sum(np.log1p(np.outer(move, ratio[start : start + 4096])), axis=1)
        return np.real(np.exp(exponent) * scale * (1.0 + 1j * _KAPPA * y / root))

    previous = math.nan
    for halving in range(12):
        step = 0.5 / 2**halving
        total = 0.5 * float(integrand(np.zeros(1))[0])
        block = np.arange(1, 33, dtype=np.float64)
        largest = total
        while True:
            values = integrand(block * step)
            total += float(np.sum(values))
            largest = max(largest, float(np.max(np.abs(values))))
            if float(np.max(np.abs(values))) < 1e-14 * largest:
                break
            if block[-1] > 2_000_000:
                raise ArithmeticError(f"the tail of {n} weighted exponentials did not converge; please report it.")
            block = block + 32.0
        estimate = total * step / math.pi
        if estimate > 0 and abs(estimate - previous) <= 1e-8 * estimate:
            return min(0.0, peak + math.log(estimate))
        previous = estimate
    raise ArithmeticError(f"the tail of {n} weighted exponentials did not converge; please report it.")
