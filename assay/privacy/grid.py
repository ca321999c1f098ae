"""Real values to integers on a public grid, before anything is summed.

Guarantee: the result depends on each value alone, so that the integer sensitivity of a sum is that of its integers;
values outside the public bounds are clamped, and how many were is reported to the holder of the data.
Sums of doubles have no such guarantee: rounding and order change them by more than any one record should.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_MAX_BITS = 40


@dataclass(frozen=True)
class Grid:
    """A public interval cut into 2**bits - 1 equal steps.

    Attributes
    ----------
    low, high
        The bounds, finite, low < high. They must not be read off the data.
    bits
        In [1, 40]: integers 0 .. 2**bits - 1 stand for the values from low to high.
    """

    low: float
    high: float
    bits: int = 20

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low and high must be finite with low < high, got {self.low} and {self.high}.")
        if not math.isfinite(self.high - self.low):
            raise ValueError("high - low must be finite; scale the values down first.")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= _MAX_BITS:
            raise ValueError(f"bits must be an integer in [1, {_MAX_BITS}], got {self.bits!r}.")

    @property
    def top(self) -> int:
        """The largest integer, 2**bits - 1."""
        return int(2**self.bits) - 1

    @property
    def step(self) -> float:
        """What one integer is worth."""
        return (self.high - self.low) / self.top


@dataclass(frozen=True)
class Quantised:
    """Integers on a grid.

    Attributes
    ----------
    values
        int64, shape of the input, in [0, grid.top].
    grid
        The grid.
    n_clamped
        How many values lay outside the bounds. It is a fact about the data: not for publication without noise.
    """

    values: npt.NDArray[np.int64] = field(repr=False)
    grid: Grid
    n_clamped: int


def quantise(values: npt.ArrayLike, grid: Grid) -> Quantised:
    """Nearest integers on the grid, clamped to it.

    Guarantee: a function of each value alone; off by at most half a step for values within the bounds.

    Parameters
    ----------
    values
        Real numbers, any shape, not NaN; infinities are clamped.
    grid
        Public bounds and resolution.

    Raises
    ------
    TypeError
        If `values` are not real numbers.
    ValueError
        If one is NaN.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "buif":
        raise TypeError(f"values must be real numbers, got {array.dtype}.")
    array = array.astype(np.float64)
    if np.isnan(array).any():
        raise ValueError("values must not be NaN. Drop or impute such records before the privacy boundary.")
    outside = int(np.count_nonzero((array < grid.low) | (array > grid.high)))
    inside = np.clip(array, grid.low, grid.high)
    # Rounding can pass the top by one part in 2**53 of the range; the second clip makes the bound exact.
    cells = np.clip(np.rint((inside - grid.low) / (grid.high - grid.low) * grid.top), 0, grid.top).astype(np.int64)
    return Quantised(cells, grid, outside)


def restore(values: npt.ArrayLike, grid: Grid, *, count: float = 1.0) -> npt.NDArray[np.float64]:
    """Integers, or sums of `count` of them, as real values: count * low + step * integer."""
    found: npt.NDArray[np.float64] = count * grid.low + grid.step * np.asarray(values, dtype=np.float64)
    return found
