"""Counters from factorisations A = L C of the prefix sums into Toeplitz matrices, for Gaussian noise.

One step moves C x by a column of C, so Gaussian noise of variance l2_squared / (2 rho) on each entry is rho-zCDP, and
release t has `rows(t)` times that variance: the squared row norm of L.
References: Fichtenberger, Henzinger, Upadhyay (2023), arXiv:2202.11205 (square root); Dvijotham et al. (2024),
arXiv:2404.16706 and McMahan, Pillutla (2024), arXiv:2408.08868 (buffered linear Toeplitz).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from assay.privacy.continual.trees import Floats, Times, check_horizon, checked_times

_LARGEST = 2**26  # coefficient tables of 0.5 GB
LARGEST_FIT = 2**28  # horizon times bands: some ten seconds


@dataclass(frozen=True)
class SquareRoot:
    """C = L = the square root of the prefix-sum matrix; within a small constant of the best factorisation."""

    horizon: int
    name = "square root"
    l1 = None

    def __post_init__(self) -> None:
        check_horizon(self.horizon)
        if self.horizon > _LARGEST:
            raise ValueError(f"horizon must be at most 2**26 for the square root, got {self.horizon}. Use BLT.")

    @property
    def l2_squared(self) -> float:
        """Sum of the squared coefficients."""
        return float(self.rows(np.array([self.horizon]))[0])

    @property
    def memory(self) -> int:
        """All noise is drawn at the start."""
        return self.horizon

    @property
    def variation(self) -> float:
        """Sum of |c_k - c_(k-1)| over a column of C: the coefficients fall from 1."""
        return 2.0

    def noise_filter(self) -> Floats:
        """Coefficients of L, shape (horizon,)."""
        return square_root(self.horizon)

    def rows(self, times: Times) -> Floats:
        """Sum of the first t squared coefficients."""
        found: Floats = np.cumsum(square_root(self.horizon) ** 2)[checked_times(times, self.horizon) - 1]
        return found


@dataclass(frozen=True)
class Banded:
    """C with `bands` coefficients only: a unit that comes back after `bands` steps meets fresh noise.

    For one contribution it is worse than the square root. For k contributions at least `bands` steps apart the columns
    of C that they move share no row, so the squared sensitivity is k times `l2_squared`, not k^2 times.

    Attributes
    ----------
    bands
        Coefficients of C, in [1, horizon].
    coefficients
        Of C, as many as `bands`, the first of them 1; empty for those of the square root, cut off. Fit with
        `fit_banded`.
    """

    horizon: int
    bands: int
    coefficients: tuple[float, ...] = ()
    name = "banded"
    l1 = None

    def __post_init__(self) -> None:
        check_horizon(self.horizon)
        if self.horizon > _LARGEST:
            raise ValueError(f"horizon must be at most 2**26 for a banded matrix, got {self.horizon}. Use BLT.")
        if type(self.bands) is not int or not 1 <= self.bands <= self.horizon:
            raise ValueError(f"bands must be an integer in [1, {self.horizon}], got {self.bands!r}.")
        if self.coefficients:
            finite = all(map(math.isfinite, self.coefficients))
            if len(self.coefficients) != self.bands or not finite or self.coefficients[0] != 1:
                # Rounding to the noise's grid is paid for by columns of norm at least 1.
                raise ValueError(f"coefficients must be {self.bands} finite numbers, the first of them 1.")

    @property
    def l2_squared(self) -> float:
        """Sum of the squared coefficients."""
        return float(np.sum(self._column() ** 2))

    @property
    def memory(self) -> int:
        """All noise is drawn at the start."""
        return self.horizon

    @property
    def variation(self) -> float:
        """Sum of |c_k - c_(k-1)| over a column of C, from 0 to 0."""
        return float(np.abs(np.diff(self._column(), prepend=0.0, append=0.0)).sum())

    def noise_filter(self) -> Floats:
        """Coefficients of L = A C^-1, shape (horizon,)."""
        return _banded_filter(self.horizon, self.bands, self.coefficients)

    def rows(self, times: Times) -> Floats:
        """Sum of the first t squared coefficients of L."""
        found: Floats = np.cumsum(self.noise_filter() ** 2)[checked_times(times, self.horizon) - 1]
        return found

    def _column(self) -> Floats:
        return np.array(self.coefficients) if self.coefficients else square_root(self.bands)


@dataclass(frozen=True)
class BufferedLinear:
    """BLT: both C and its inverse are rational filters, so the noise runs on d + 1 numbers however long the stream.

    C(x) = prod (1 - zero_j x) / prod (1 - pole_j x). Fit with `fit_blt`.

    Attributes
    ----------
    poles, zeros
        d numbers each in (0, 1), interlaced: pole_1 > zero_1 > pole_2 > ...
    unbounded
        Whether the sensitivity is that of an endless stream, so that the counter may go on past `horizon`.
    """

    horizon: int
    poles: tuple[float, ...]
    zeros: tuple[float, ...]
    unbounded: bool = False
    name = "BLT"
    l1 = None

    def __post_init__(self) -> None:
        check_horizon(self.horizon)
        both = [value for pair in zip(self.poles, self.zeros, strict=False) for value in pair]
        if not self.poles or len(self.poles) != len(self.zeros):
            raise ValueError(f"poles and zeros must be as many, got {len(self.poles)} and {len(self.zeros)}.")
        if not all(1 > big > small > 0 for big, small in zip([1 - 1e-16, *both], both, strict=False)):
            raise ValueError("poles and zeros must be in (0, 1), interlaced and descending, starting with a pole.")

    @property
    def l2_squared(self) -> float:
        """1 + the sum of (sum_j w_j pole_j^k)^2 over k = 0 .. T - 2, or over all k >= 0, by geometric sums."""
        poles, weights = np.array(self.poles), blt_weights(np.array(self.poles), np.array(self.zeros))
        return float(1 + _geometric(poles, weights, None if self.unbounded else np.array([self.horizon - 1]))[0])

    @property
    def variation(self) -> float:
        """Sum of |c_k - c_(k-1)| over a column of C: 1, then less than 1 and falling, for poles and zeros interlace."""
        return 2.0

    @property
    def memory(self) -> int:
        """One number per buffer and the running sum."""
        return len(self.poles) + 1

    def rows(self, times: Times) -> Floats:
        """Sum of the first t squared coefficients of L; past `horizon` too where unbounded."""
        checked = checked_times(times, 2**62 if self.unbounded else self.horizon)
        rates, weights = blt_noise(np.array(self.poles), np.array(self.zeros))
        return _geometric(rates, weights, checked)

    def mean_row(self) -> float:
        """Mean of `rows` over 1 .. horizon, by geometric sums."""
        rates, weights = blt_noise(np.array(self.poles), np.array(self.zeros))
        total, n = 0.0, float(self.horizon)
        for i, j in np.ndindex(len(rates), len(rates)):
            p = float(rates[i] * rates[j])
            mean = (n + 1) / 2 if p == 1 else (1 + p * math.expm1(n * math.log(p)) / ((1 - p) * n)) / (1 - p)
            total += float(weights[i] * weights[j] * mean)
        return total


def square_root(length: int) -> Floats:
    """Coefficients of (1 - x)^(-1/2): 1, 1/2, 3/8, ...; f_k = f_(k-1) (2k - 1) / (2k).

    Returns
    -------
    float64, shape (length,).
    """
    k = np.arange(1, length, dtype=np.float64)
    return np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])


@functools.lru_cache(maxsize=4)
def _banded_filter(horizon: int, bands: int, coefficients: tuple[float, ...]) -> Floats:
    from scipy.signal import lfilter

    column = np.array(coefficients) if coefficients else square_root(bands)
    found: Floats = lfilter([1.0], column, np.ones(horizon))
    found.setflags(write=False)
    return found


def blt_weights(poles: Floats, zeros: Floats) -> Floats:
    """w_j of C(x) = 1 + sum_j w_j x / (1 - pole_j x): the residues."""
    gaps = poles[:, None] - poles[None, :]
    np.fill_diagonal(gaps, 1.0)
    found: Floats = np.prod(poles[:, None] - zeros[None, :], axis=1) / np.prod(gaps, axis=1)
    return found


def blt_noise(poles: Floats, zeros: Floats) -> tuple[Floats, Floats]:
    """Rates and weights of L = A C^-1: coefficient k of L is sum_j weight_j rate_j^k; the first rate is 1."""
    rates = np.concatenate([[1.0], zeros])
    gaps = rates[:, None] - rates[None, :]
    np.fill_diagonal(gaps, 1.0)
    # L(x) = prod (1 - pole x) / prod (1 - rate x) has one pole more than zeros, hence no constant term apart.
    weights: Floats = np.prod(rates[:, None] - poles[None, :], axis=1) / np.prod(gaps, axis=1)
    return rates, weights


def _geometric(rates: Floats, weights: Floats, counts: Times | None) -> Floats:
    """Sum over k < count of (sum_j weight_j rate_j^k)^2, for each count; None stands for infinitely many."""
    product = rates[:, None] * rates[None, :]
    pairs = weights[:, None] * weights[None, :]
    with np.errstate(divide="ignore"):
        if counts is None:
            return np.array([np.sum(pairs / (1 - product))])
        logs = np.log(product)
        # The pair (1, 1) of a rate of one is a plain count.
        slope = np.where(product == 1, 1.0, -1 / np.where(product == 1, -1.0, np.expm1(logs)))
        n = counts.astype(np.float64)
        if n.size <= 64:
            terms = np.where(product == 1, n[:, None, None], -np.expm1(n[:, None, None] * logs) * slope)
            small: Floats = np.sum(pairs * terms, axis=(1, 2))
            return small
        found = np.zeros(counts.shape)
        for i, j in np.ndindex(product.shape):  # pair by pair: all at once would be (d + 1)^2 tables of the length
            found += pairs[i, j] * (n if product[i, j] == 1 else -np.expm1(n * logs[i, j]) * slope[i, j])
    return found


@functools.lru_cache(maxsize=64)
def fit_blt(horizon: int, buffers: int, *, unbounded: bool = False) -> BufferedLinear:
    """The poles and zeros that make the largest variance l2_squared rows(horizon) smallest, by descent from two starts.

    Guarantee: none that the minimum is global; privacy does not depend on it, and the error is what `rows` says.

    Parameters
    ----------
    horizon
        T; for `unbounded` the time at which the error is made small.
    buffers
        d in [1, 10].
    unbounded
        Use the sensitivity of an endless stream.
    """
    from scipy.optimize import minimize

    check_horizon(horizon)
    if type(buffers) is not int or not 1 <= buffers <= 10:
        raise ValueError(f"buffers must be an integer in [1, 10], got {buffers!r}.")
    at = np.array([horizon])

    def split(gaps: Floats) -> tuple[Floats, Floats]:
        # Descending values in (0, 1): log-odds that fall by exp(gap) each.
        odds = gaps[0] - np.concatenate([[0.0], np.cumsum(np.exp(np.clip(gaps[1:], -12, 5)))])
        both = 1 / (1 + np.exp(-np.clip(odds, -30, 30)))
        return both[0::2], both[1::2]

    def loss(gaps: Floats) -> float:
        poles, zeros = split(gaps)
        rates, noise = blt_noise(poles, zeros)
        columns = 1 + _geometric(poles, blt_weights(poles, zeros), None if unbounded else at - 1)[0]
        value = math.log(columns) + math.log(_geometric(rates, noise, at)[0])
        return value if math.isfinite(value) else 1e6

    best = None
    top = math.log(horizon + 1.0)
    for spread in (1.0, 0.6):
        start = np.concatenate(
            [[top * spread + 0.5], np.log(np.full(2 * buffers - 1, (top + 3) * spread / (2 * buffers)))]
        )
        found = minimize(loss, start, method="BFGS", options={"gtol": 1e-7, "maxiter": 400})
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None  # noqa: S101  # for the type checker
    poles, zeros = split(best.x)
    return BufferedLinear(horizon, tuple(poles.tolist()), tuple(zeros.tolist()), unbounded)


@functools.lru_cache(maxsize=64)
def fit_banded(horizon: int, bands: int) -> Banded:
    """The coefficients with the smallest largest variance l2_squared rows(horizon), by descent from the square root.

    Guarantee: none that the minimum is global; privacy does not depend on it, and the error is what `rows` says. It is
    never worse than the square root cut off.

    Parameters
    ----------
    horizon
        T.
    bands
        In [1, horizon], with horizon times bands at most 2**28.

    Notes
    -----
    L(x) = 1 / ((1 - x) c(x)), so the derivative of sum_k L_k^2 by c_j is -2 sum_k L_k G_(k - j) with G = L / c: one
    more filter, and about 20 evaluations of O(horizon bands).
    """
    from scipy.optimize import minimize
    from scipy.signal import lfilter

    design = Banded(horizon, bands)  # checks both
    if horizon * bands > LARGEST_FIT:
        raise ValueError(f"horizon times bands must be at most 2**28 to be fitted, got {horizon * bands}.")
    if bands == 1:
        return design
    ones = np.ones(horizon)

    def loss(rest: Floats) -> tuple[float, Floats]:
        column = np.concatenate([[1.0], rest])
        with np.errstate(over="ignore", invalid="ignore"):
            noise = lfilter([1.0], column, ones)
            slope = lfilter([1.0], column, noise)
            columns, rows = float(column @ column), float(noise @ noise)
            steps = np.array([noise[j:] @ slope[: horizon - j] for j in range(1, bands)])
        if not (math.isfinite(rows) and np.isfinite(steps).all()):
            return 1e6, np.zeros(bands - 1)  # 1 / c grows without bound there
        return math.log(columns) + math.log(rows), 2 * rest / columns - 2 * steps / rows

    start = square_root(bands)[1:]
    options = {"maxiter": 500, "maxcor": 30, "ftol": 1e-14, "gtol": 1e-8}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    best = found.x if found.fun <= loss(start)[0] else start
    return Banded(horizon, bands, (1.0, *best.tolist()))


def nuclear_bound(horizon: int) -> float:
    """No Gaussian factorisation has a mean variance below this, in units of 1 / (2 rho): (nuclear norm of A / T)^2.

    The singular values of the prefix sums are 1 / (2 sin((2j - 1) pi / (4T + 2))), j = 1 .. T.
    """
    check_horizon(horizon)
    j = np.arange(1, horizon + 1, dtype=np.float64)
    return float((np.sum(0.5 / np.sin((2 * j - 1) * np.pi / (4 * horizon + 2))) / horizon) ** 2)
