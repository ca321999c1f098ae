"""The public interval of every coordinate, and records as integers on its grid."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from assay.privacy.grid import Grid, quantise
from assay.privacy.noise import Integers

Floats = npt.NDArray[np.float64]

# Eighth powers of it, and sums of those, are still finite.
_LARGEST = 1e30


@dataclass(frozen=True)
class Clamping:
    """How many values lay outside the public bounds and were moved to them.

    These numbers are as private as the data: they are kept out of files, pickles and printed objects. To publish one,
    give it noise and a cost of its own: a record changes `records` by at most 1.

    Attributes
    ----------
    values
        Coordinates that were moved.
    records
        Records with at least one such coordinate.
    """

    values: int = field(repr=False)
    records: int = field(repr=False)


@dataclass(frozen=True, eq=False)
class Frame:
    """Public bounds of each coordinate.

    Attributes
    ----------
    low, high
        float64, shape (dims,).
    """

    low: Floats
    high: Floats

    @classmethod
    def make(cls, low: npt.ArrayLike, high: npt.ArrayLike, dims: int) -> Frame:
        """Bounds given as numbers, or one per coordinate.

        Raises
        ------
        ValueError
            If a shape is not () or (dims,), or low < high does not hold for finite numbers.
        """
        sides = []
        for name, side in (("low", low), ("high", high)):
            array = np.asarray(side)
            if array.dtype.kind not in "iuf" or array.shape not in ((), (dims,)):
                raise ValueError(
                    f"{name} must be a number or {dims} of them, got {array.dtype} of shape {array.shape}."
                )
            sides.append(np.broadcast_to(array.astype(np.float64), (dims,)).copy())
        for lowest, highest in zip(*sides, strict=True):
            Grid(lowest, highest)  # checks
        return cls(*sides)

    @property
    def width(self) -> Floats:
        """high - low."""
        return self.high - self.low

    def step(self, bits: int) -> Floats:
        """One step of the grid."""
        found: Floats = self.width / float(2**bits - 1)
        return found

    def span(self, bits: int) -> Floats:
        """Length covered by 2**bits cells of one step, each centred on its grid value."""
        found: Floats = self.step(bits) * float(2**bits)
        return found

    def origin(self, bits: int) -> Floats:
        """Left end of the first cell."""
        return self.low - self.step(bits) / 2

    def cells(self, points: Floats, bits: int) -> tuple[Integers, Clamping]:
        """Records on the grid, int64, shape (n, dims), clamped to the bounds."""
        cells = np.empty(points.shape, dtype=np.int64)
        values = 0
        outside = np.zeros(len(points), dtype=bool)
        for j in range(points.shape[1]):
            one = quantise(points[:, j], Grid(float(self.low[j]), float(self.high[j]), bits))
            cells[:, j] = one.values
            values += one.n_clamped
            if one.n_clamped:
                outside |= (points[:, j] < self.low[j]) | (points[:, j] > self.high[j])
        return cells, Clamping(values, int(outside.sum()))


def as_points(values: npt.ArrayLike, dims: int, argument: str, *, finite: bool = False) -> Floats:
    """Real vectors as float64 of shape (n, dims); for one coordinate also (n,), for a single query see the caller.

    Raises
    ------
    TypeError
        If they are not real numbers.
    ValueError
        If the shape is wrong, one is NaN, or, with `finite`, infinite or beyond 1e30.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "buif":
        raise TypeError(f"{argument} must be real numbers, got {array.dtype}.")
    if array.ndim == 1 and dims == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != dims:
        raise ValueError(f"{argument} must have shape (n, {dims}), got {array.shape}.")
    array = np.ascontiguousarray(array, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{argument} must not be NaN. Drop or impute such rows first.")
    if finite and array.size and not np.abs(array).max() <= _LARGEST:
        raise ValueError(
            f"{argument} must be finite, at most {_LARGEST:g} in magnitude. Scale them down, and the bounds."
        )
    return array
