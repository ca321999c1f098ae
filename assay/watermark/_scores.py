"""The sum score of the Gumbel watermark on marked tokens: P(Y_1 + ... + Y_n <= s), Y = -log(1 - U), U ~ Beta(1/p, 1).

E exp(-z Y) = B(1/p, 1 + z) / p, so long sums follow by Laplace inversion and short ones by a lattice. Reference:
Aaronson (2022); `_inversion` for the quadrature.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, special

from assay.watermark._inversion import Complexes, quadrature
from assay.watermark._laws import Floats

ERROR = 1e-7  # absolute error of the probabilities, up to a million tokens

_SHORT = 16
_LATTICE = 2**15


def score_cdf(s: float, p: Floats, shares: Floats, n: int) -> float:
    """P(Y_1 + ... + Y_n <= s) where each token has model probability p[g] with chance shares[g], independently.

    Parameters
    ----------
    s
        The bound, > 0.
    p, shares
        float64, shape (groups,).
    n
        Number of tokens, >= 1.
    """
    return _cdf(s, 1.0 / p, shares, np.array([n], dtype=np.float64), mixture=True)


def score_cdf_given(s: float, p: Floats) -> float:
    """P(Y_1 + ... + Y_n <= s) for tokens of model probabilities p, shape (n,)."""
    values, counts = np.unique(p, return_counts=True)
    return _cdf(s, 1.0 / values, np.ones(len(values)), counts.astype(np.float64), mixture=False)


def _cdf(s: float, a: Floats, shares: Floats, counts: Floats, *, mixture: bool) -> float:
    """For transforms (sum_g shares_g a_g B(a_g, 1 + z))^n, or prod_g (a_g B(a_g, 1 + z))^counts_g."""
    if counts.sum() <= _SHORT:
        return _short(s, a, shares, counts, mixture=mixture)
    return _long(s, a[None, :], np.log(shares * a), counts, mixture=mixture)


def _short(s: float, a: Floats, shares: Floats, counts: Floats, *, mixture: bool) -> float:
    """By convolution of the scores rounded to the nearest point of a lattice, of which s is a midpoint."""
    # Rounding errors are centred, so the cdf moves by the second order only: n cell^2 / 24 times the density's slope.
    cell = s / (_LATTICE + 0.5)
    # P(Y <= y) = (1 - exp(-y))^a
    log_u = np.log(-np.expm1(-cell * (np.arange(_LATTICE + 1) + 0.5)))
    # Scores above s are left out; the rest must not wrap around.
    size = fft.next_fast_len(int(counts.sum()) * _LATTICE + 1, real=True)
    if mixture:
        law = np.zeros(_LATTICE + 1)
        for power, share in zip(a, shares, strict=True):
            law += share * np.exp(power * log_u)
        transform = fft.rfft(np.diff(law, prepend=0.0), size) ** counts[0]
    else:
        transform = np.ones(size // 2 + 1, dtype=np.complex128)
        for power, count in zip(a, counts, strict=True):
            transform *= fft.rfft(np.diff(np.exp(power * log_u), prepend=0.0), size) ** count
    return float(np.clip(np.sum(fft.irfft(transform, size)[: _LATTICE + 1]), 0.0, 1.0))


def _log_gamma_step(a: Floats, b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """log Gamma(a + b) - log Gamma(a), shapes (1, groups) and (nodes, 1), without cancellation where a is large."""
    out: npt.NDArray[Any] = special.loggamma(a + b) - special.loggamma(a)
    far = a[0] > 100.0
    if far.any():
        # Stirling's series of both terms; the first omitted one is below 1e-13.
        c = a[:, far]
        near, base = 1.0 / (c + b), 1.0 / c
        series = (near - base) / 12.0 - (near**3 - base**3) / 360.0
        out[:, far] = (c * np.log1p(b / c) - b) + (b - 0.5) * np.log1p(b / c) + b * np.log(c) + series
    return out


def _long(s: float, a: Floats, log_c: Floats, m: Floats, *, mixture: bool) -> float:
    """By inversion along the vertical line through the saddlepoint."""

    def log_terms(z: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # shape (nodes, groups)
        out: npt.NDArray[Any] = log_c + special.loggamma(1.0 + z[:, None]) - _log_gamma_step(a, 1.0 + z[:, None])
        return out

    def log_transform(z: npt.NDArray[Any]) -> npt.NDArray[Any]:
        terms = log_terms(z)
        out: npt.NDArray[Any] = m[0] * special.logsumexp(terms, axis=1) if mixture else terms @ m
        return out

    def weights(z: float) -> Floats:
        # The mixture's derivatives are averages over its components, tilted; a product's are sums.
        return np.asarray(special.softmax(np.real(log_terms(np.array([z])))[0]) if mixture else m)

    def slope(z: float) -> float:
        d1 = special.digamma(1.0 + z) - special.digamma(1.0 + z + a[0])
        return s - 1.0 / z + float(weights(z) @ d1) * (m[0] if mixture else 1.0)

    low, high = 0.0, 1.0
    while slope(high) < 0.0:
        low, high = high, 2.0 * high
    for _ in range(40):
        theta = 0.5 * (low + high)
        low, high = (theta, high) if slope(theta) < 0.0 else (low, theta)
    theta = 0.5 * (low + high)
    d1, d2, d3 = (special.polygamma(k, 1.0 + theta) - special.polygamma(k, 1.0 + theta + a[0]) for k in range(3))
    share = weights(theta)
    if mixture:
        m1, m2, m3 = share @ d1, share @ (d1**2 + d2), share @ (d1**3 + 3 * d1 * d2 + d3)
        k2, k3 = m[0] * (m2 - m1**2), m[0] * (m3 - 3 * m1 * m2 + 2 * m1**3)
    else:
        k2, k3 = share @ d2, share @ d3
    at_saddle = float(np.real(log_transform(np.array([theta])))[0])

    def log_ratio(move: Complexes) -> Complexes:
        out: Complexes = move + log_transform(theta + move[0] / s)[None, :] - at_saddle
        return out

    scaled = np.array([theta * s])
    second, third = 1.0 / scaled**2 + k2 / s**2, -2.0 / scaled**3 + k3 / s**3
    # No bend: a contour bent to the left meets exp(z (s - log a)), which explodes for rare tokens.
    mass, _ = quadrature(log_ratio, scaled, second, third, bend=0.0, tokens=float(m.sum()))
    return min(1.0, float(np.exp(scaled - np.log(scaled) + at_saddle + np.log(mass))[0]))
