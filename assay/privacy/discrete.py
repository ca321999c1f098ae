"""Discrete Laplace and Gaussian noise on the integers, drawn exactly: no floating point touches a sample.

Laws: P(y) proportional to exp(-|y| / scale), and to exp(-y**2 / (2 variance)), for all integers y; both rational.
Reference: Canonne, Kamath, Steinke (2020), algorithms 1 to 3, arXiv:2004.00010.

This file is the sampler on Python's integers, exact for every rational and slow. `discrete_numba` is the same
algorithm in machine integers: on the same random words both give the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Below = Callable[[int], int]  # below(n): uniform on 0 .. n - 1

# Beyond this scale a sample could leave int64; the guard costs nothing that anyone needs.
MAX_SCALE = 2**50


def bernoulli_exp(below: Below, num: int, den: int) -> bool:
    """True with probability exp(-num / den), for 0 <= num <= den (algorithm 1).

    The first k at which an event of probability (num / den) / k fails is odd with exactly that probability: the series
    of exp, summed by coin tosses.
    """
    k = 1
    while below(den * k) < num:
        k += 1
    return k % 2 == 1


def laplace(below: Below, num: int, den: int) -> int:
    """One draw of the discrete Laplace law of scale num / den (algorithm 2)."""
    while True:
        u = below(num)
        if not bernoulli_exp(below, u, num):
            continue
        v = 0
        while bernoulli_exp(below, 1, 1):
            v += 1
        y = (u + num * v) // den
        if below(2) == 0:
            return y
        if y:  # zero has one sign, or it would be drawn twice as often
            return -y


def gaussian(below: Below, num: int, den: int) -> int:
    """One draw of the discrete Gaussian law of variance parameter num / den (algorithm 3)."""
    sigma = math.isqrt(num)
    if den == 1 and sigma * sigma == num:
        return gaussian_of_sigma(below, sigma)
    t = math.isqrt(num // den) + 1
    while True:
        y = laplace(below, t, 1)
        # exp(-(|y| - v/t)^2 / (2v)) with v = num / den, on one denominator.
        whole, rest = divmod((abs(y) * t * den - num) ** 2, 2 * num * den * t * t)
        if _all_exp_minus_one(below, whole) and bernoulli_exp(below, rest, 2 * num * den * t * t):
            return y


def gaussian_of_sigma(below: Below, sigma: int) -> int:
    """As `gaussian`, for an integer standard deviation parameter: no product of large numbers is formed.

    With y = u + sigma v the exponent (|y| - sigma)^2 / (2 sigma^2) is (v - 1)^2 / 2 + (v - 1) u / sigma
    + u^2 / (2 sigma^2) for v >= 1 and (sigma - u)^2 / (2 sigma^2) for v = 0; each term is one more coin.
    """
    while True:
        u = below(sigma)
        if not bernoulli_exp(below, u, sigma):
            continue
        v = 0
        while bernoulli_exp(below, 1, 1):
            v += 1
        negative = below(2) == 1
        if negative and u == 0 and v == 0:
            continue
        kept = True
        for _ in range((v - 1) ** 2 if v else 0):
            if not bernoulli_exp(below, 1, 2):
                kept = False
                break
        for _ in range(v - 1 if kept else 0):
            if not bernoulli_exp(below, u, sigma):
                kept = False
                break
        if kept and _exp_half_square(below, u if v else sigma - u, sigma):
            y = u + sigma * v
            return -y if negative else y


def _all_exp_minus_one(below: Below, times: int) -> bool:
    """True with probability exp(-times); stops at the first failure, so a huge exponent costs nothing."""
    return all(bernoulli_exp(below, 1, 1) for _ in range(times))


def _exp_half_square(below: Below, a: int, b: int) -> bool:
    """True with probability exp(-(a/b)^2 / 2), for 0 <= a <= b."""
    k = 1
    while below(b) < a and below(b) < a and below(2 * k) == 0:
        k += 1
    return k % 2 == 1


def log_pmf_laplace(y: npt.ArrayLike, scale: Fraction | float) -> npt.NDArray[np.float64]:
    """Log-probabilities of the discrete Laplace law.

    Parameters
    ----------
    y
        Integers, any shape.
    scale
        Positive.

    Returns
    -------
    float64, shape of `y`: log((1 - q) / (1 + q)) - |y| / scale with q = exp(-1 / scale).
    """
    rate = 1.0 / float(scale)
    # (1 - q)/(1 + q) = tanh(rate/2), which keeps its digits for large scales.
    found: npt.NDArray[np.float64] = math.log(math.tanh(rate / 2)) - np.abs(np.asarray(y, dtype=np.float64)) * rate
    return found


def log_pmf_gaussian(y: npt.ArrayLike, variance: Fraction | float) -> npt.NDArray[np.float64]:
    """Log-probabilities of the discrete Gaussian law; arguments as `log_pmf_laplace`, with a variance parameter."""
    v = float(variance)
    reach = math.ceil(40 * math.sqrt(v)) + 2
    if reach > 10**7:
        # Poisson summation: the normaliser is sqrt(2 pi v) (1 + 2 exp(-2 pi^2 v) + ...), here 1 to far below 1e-300.
        log_norm = 0.5 * math.log(2 * math.pi * v)
    else:
        grid = np.arange(-reach, reach + 1, dtype=np.float64)
        log_norm = math.log(math.fsum(np.exp(-(grid**2) / (2 * v))))
    found: npt.NDArray[np.float64] = -(np.asarray(y, dtype=np.float64) ** 2) / (2 * v) - log_norm
    return found


def variance_of_laplace(scale: Fraction | float) -> float:
    """Variance of the discrete Laplace law: 2 q / (1 - q)^2 with q = exp(-1 / scale); at most 2 scale^2."""
    half = 0.5 / float(scale)
    return 0.5 / math.sinh(half) ** 2


def variance_of_gaussian(variance: Fraction | float) -> float:
    """Variance of the discrete Gaussian law: at most its parameter, equal to it within 1e-15 from 4 on."""
    v = float(variance)
    if v > 4:
        return v
    grid = np.arange(-100, 101, dtype=np.float64)
    return float(np.exp(log_pmf_gaussian(grid, v)) @ grid**2)
