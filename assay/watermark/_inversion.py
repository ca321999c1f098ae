"""P(S <= s) for positive sums with a known Laplace transform, many at a time, by contour quadrature.

The Bromwich integral of exp(z s) E exp(-z S) / z on a hyperbola through the real saddlepoint; the transforms here have
singularities on the negative real axis only, so the trapezoidal rule converges geometrically. Reference: Weideman and
Trefethen (2007), Parabolic and hyperbolic contours for computing the Bromwich integral, Math. Comp. 76.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.watermark._laws import Floats

Complexes = npt.NDArray[np.complex128]

_BEND = 0.5  # slope of the contour's asymptotes against the vertical
_BLOCK = 32
_MAX_BLOCKS = 400
_SETTLED = 1e-11
ROUNDING = 2e-15  # per factor, relative
_CHUNK = 2_000_000  # complex numbers held at once


def quadrature(
    log_ratio: Callable[[Complexes], Complexes],
    theta: Floats,
    second: Floats,
    third: Floats,
    *,
    bend: float = _BEND,
    tokens: float = 1.0,
) -> tuple[Floats, Floats]:
    """Integrals over the contour, relative to the peak: of the integrand, and of z times the integrand.

    log_ratio(move) is log E exp(-(theta + move) S) - log E exp(-theta S) + move for s = 1, shape (rows, nodes). second
    and third are derivatives at theta of the exponent z - log z + log E exp(-z S). All rows share the nodes. With
    bend = 0 the contour is the vertical line. tokens is the largest number of factors: their rounding errors add up.
    """
    scale = 1.0 / np.sqrt(second)
    arm = np.maximum(bend, 1e-12) * np.minimum(3.0 * second / np.maximum(-third, 1e-300), 1e6 * (theta + scale))

    def terms(t: Floats) -> Complexes:
        y = scale[:, None] * t
        root = np.hypot(y, arm[:, None])
        # Without the subtraction of nearly equal numbers: root - arm = y^2 / (root + arm).
        move = -bend * y * y / (root + arm[:, None]) + 1j * y
        value: Complexes = np.exp(log_ratio(move) - np.log1p(move / theta[:, None]))
        value *= scale[:, None] * (1.0 + 1j * bend * y / root)
        return np.stack([value, value * (theta[:, None] + move)])

    # Accuracy is relative to the integral of the modulus: far above the mean the density itself cancels to nothing.
    modulus = np.abs(terms(np.zeros(1)))[:, :, 0] * 1e-3

    def swept(first: float, step: float) -> Floats:
        total = np.zeros((2, len(theta)))
        for block in range(_MAX_BLOCKS):
            values = terms(first + step * (block * _BLOCK + np.arange(_BLOCK, dtype=np.float64)))
            total += step * np.real(values).sum(axis=2)
            np.maximum(modulus, step * np.abs(values).sum(axis=2), out=modulus)
            if np.all(np.abs(values[:, :, -1]) <= 1e-16 * modulus):
                return total
        raise ArithmeticError("contour quadrature did not come to its end.")  # pragma: no cover

    step = 0.5
    # The node at zero counts half in the integral over t >= 0.
    total = swept(step, step) + 0.5 * step * np.real(terms(np.zeros(1)))[:, :, 0]
    for _ in range(8):
        finer = 0.5 * total + swept(0.5 * step, step) * 0.5
        change = np.abs(finer - total) / modulus
        total, step = finer, 0.5 * step
        if np.all(change <= _SETTLED + ROUNDING * tokens):
            return total[0] / np.pi, total[1] / np.pi
    raise ArithmeticError("contour quadrature did not settle.")


def log_gamma_sum_cdf(s: Floats, weights: Floats, counts: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """log P(sum_g w_g G_g <= s), G_g ~ Gamma(counts_g, 1) independent; and its derivative by log s.

    Parameters
    ----------
    s
        float64, shape (rows,), > 0.
    weights
        float64, shape (groups,) or (rows, groups), >= 0.
    counts
        Shape (groups,) or (rows, groups), >= 0; at least one positive per row.

    Returns
    -------
    (log_cdf, elasticity): float64, shape (rows,); relative error of the probability below 1e-9 + 2e-15 sum(counts).
    """
    shape = (len(s), np.shape(counts)[-1])
    w = np.broadcast_to(weights, shape) / s[:, None]
    m = np.broadcast_to(np.asarray(counts, dtype=np.float64), shape)
    log_cdf, elasticity = np.empty(len(s)), np.empty(len(s))
    rows = max(1, _CHUNK // (_BLOCK * shape[1]))
    for start in range(0, len(s), rows):
        part = slice(start, start + rows)
        log_cdf[part], elasticity[part] = _gamma_sum_rows(w[part], m[part])
    return log_cdf, elasticity


def _saddle(w: Floats, m: Floats) -> tuple[Floats, Floats, Floats]:
    """The saddlepoint at s = 1, the ratios w / (1 + w theta), and the exponent there."""
    # The exponent z - log z - sum m log(1 + w z) is convex; its slope changes sign between 1 and 1 + sum m.
    low, high = np.zeros(len(w)), np.log1p(m.sum(axis=1))
    for _ in range(30):
        middle = 0.5 * (low + high)
        z = np.exp(middle)[:, None]
        rising = np.sum(m * w / (1.0 + w * z), axis=1) + 1.0 / z[:, 0] < 1.0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    theta = np.exp(0.5 * (low + high))
    peak = theta - np.log(theta) - np.sum(m * np.log1p(w * theta[:, None]), axis=1)
    return theta, w / (1.0 + w * theta[:, None]), peak


def _gamma_sum_rows(w: Floats, m: Floats) -> tuple[Floats, Floats]:
    """`log_gamma_sum_cdf` at s = 1 for as many rows as fit in memory."""
    theta, ratio, peak = _saddle(w, m)
    second = 1.0 / theta**2 + np.sum(m * ratio**2, axis=1)
    third = -2.0 / theta**3 - 2.0 * np.sum(m * ratio**3, axis=1)
    single = bool((m == 1.0).all())

    def log_ratio(move: Complexes) -> Complexes:
        out: Complexes = move.copy()
        if not single:
            for g in range(w.shape[1]):  # one group at a time: the product over groups would not fit
                out -= m[:, g, None] * np.log1p(ratio[:, g, None] * move)
            return out
        for start in range(0, w.shape[1], 16):
            # Factors are multiplied 16 at a time, which costs a tenth of their logarithms and cannot overflow.
            product = np.ones_like(move)
            for g in range(start, min(start + 16, w.shape[1])):
                product *= 1.0 + ratio[:, g, None] * move
            out -= np.log(product)
        return out

    mass, density = quadrature(log_ratio, theta, second, third, tokens=float(m.sum(axis=1).max()))
    return np.minimum(0.0, peak + np.log(mass)), density / mass


def gamma_sum_quantile(log_level: float, weights: Floats, counts: npt.NDArray[Any]) -> Floats:
    """log s with log P(sum_g w_g G_g <= s) = log_level; arguments as in `log_gamma_sum_cdf`, all used weights > 0.

    Returns
    -------
    float64, shape (rows,), of the natural logarithm of the quantile.
    """
    m = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    w = np.broadcast_to(weights, m.shape)
    total = m.sum(axis=1)
    # P(S <= s) <= s^n / (n! prod w^m), so this starts at or below the root, where Newton on a concave curve climbs.
    log_w = np.log(w, out=np.zeros(m.shape), where=m > 0)
    log_s: Floats = (log_level + special.gammaln(total + 1.0) + np.sum(m * log_w, axis=1)) / total
    for _ in range(100):
        # The saddlepoint approximation comes within a few per cent of the tail, at no quadrature.
        scaled = w * np.exp(-log_s)[:, None]
        theta, ratio, peak = _saddle(scaled, m)
        second = 1.0 / theta**2 + np.sum(m * ratio**2, axis=1)
        gap = log_level - (peak - 0.5 * np.log(2.0 * np.pi * second))
        log_s += gap / theta
        if np.all(np.abs(gap) < 1e-3):
            break
    active = np.arange(len(log_s))
    for _ in range(50):
        value, elasticity = log_gamma_sum_cdf(np.exp(log_s[active]), w[active], m[active])
        gap = log_level - value
        log_s[active] += gap / elasticity
        active = active[np.abs(gap) > 1e-6]  # the next gap is of the order of its square
        if len(active) == 0:
            return log_s
    raise ArithmeticError("the quantile of a weighted sum of exponentials did not settle.")
