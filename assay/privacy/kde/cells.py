"""Fast-Gauss cells: the Gaussian kernel in up to three dimensions, from a few moments of every cell of a grid.

With lengths in units of sqrt(2) h, exp(-|s - t|^2) for a record t = c + z / 2 of the cell around c is the product over
axes of sum_k (z/2)^k / k! H_k(s - c) exp(-(s - c)^2), cut after `order` terms. A record is in one cell, and |z| <= 1.
Sources: Greengard, Strain (1991); Wagner, Naamad, Mishra (2023), LSQ. Theirs noises all moments alike; here
each has the part of the budget that its coefficient asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.privacy.kde import cells_numba as compiled
from assay.privacy.kde.blocks import Arrays, Block, Law, block, split
from assay.privacy.kde.frame import Floats, Frame
from assay.privacy.noise import Integers

_ONE = 2**24
# |H_k(t)| exp(-t^2) <= 1.0865 sqrt(2^k k!) exp(-t^2 / 2): Cramer's inequality.
_CRAMER = 1.0865


@dataclass(frozen=True, kw_only=True)
class GaussCells:
    """Moments of every cell.

    Attributes
    ----------
    counts
        Cells along each axis, 1 to 3 axes.
    order
        Moments 0 .. order - 1 of each axis.
    bandwidth
        h of exp(-|x - y|^2 / (2 h^2)); cells are sqrt(2) h wide.
    """

    name: ClassVar[str] = "cells"

    counts: tuple[int, ...]
    order: int
    bandwidth: float

    @property
    def dims(self) -> int:
        """Axes."""
        return len(self.counts)

    @property
    def size(self) -> int:
        """Released integers."""
        return int(math.prod(self.counts) * self.order**self.dims)

    def blocks(self, law: Law, amount: Fraction) -> tuple[Block, ...]:
        """One block for every moment: a record is in one cell."""
        return tuple(
            block("moments", (j, j + 1), l1=_ONE, squared=_ONE**2, share=share, law=law, amount=amount)
            for j, share in enumerate(self._shares(law))
        )

    def factor(self, law: Law) -> Fraction:
        """Two cells change, by their bounds; or one, its count not at all, even moments by 1 and others by 2."""
        if law == "laplace":
            return Fraction(2)
        moved = [0 if not k.any() else 4 if (k % 2).any() else 1 for k in self._indices()]
        worst = sum((share * m for share, m in zip(self._shares(law), moved, strict=True)), Fraction(0))
        return max(Fraction(2), worst)

    def sums(self, places: Floats) -> Arrays:
        """Exact sums; `places` are those of `places_of`."""
        out = np.zeros((math.prod(self.counts), self.order**self.dims), dtype=np.int64)
        compiled.add_moments(self._padded(places), *self._axes()[:2], float(_ONE), out)
        return {"moments": out}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of `sums`."""
        return {"moments": (math.prod(self.counts), self.order**self.dims)}

    def prepare(self, arrays: Arrays, frame: Frame) -> tuple[Floats, ...]:
        """Moments as real numbers, and where the grid begins."""
        return arrays["moments"] / float(_ONE), frame.low

    def answers(self, prepared: tuple[Floats, ...], points: Floats) -> Floats:
        """Sums over records of the kernel, shape (m,)."""
        table, low = prepared
        found: Floats = compiled.combine(self._padded(self.places_of(points, low)), *self._axes(), table, 1)
        return found

    def variance(self, blocks: tuple[Block, ...], frame: Frame, points: Floats) -> Floats:
        """Variance of the noise in each answer, shape (m,)."""
        table = np.array([[one.variance / float(_ONE) ** 2 for one in blocks]])
        found: Floats = compiled.combine(self._padded(self.places_of(points, frame.low)), *self._axes(), table, 2)
        return found

    def bias(self, n: int) -> float:
        """Most that the cut and rounding can add: for every record the tail of the series, on each axis."""
        # (1/2)^k / k! sqrt(2^k k!) = 2^(-k/2) / sqrt(k!); the terms fall faster than geometrically.
        tail = _CRAMER * sum(2.0 ** (-k / 2) / math.sqrt(math.factorial(k)) for k in range(self.order, self.order + 60))
        rounding = (_CRAMER * 3.3) ** self.dims * 2.0**-25
        return float(n * ((1 + tail) ** self.dims - 1 + rounding))

    def places_of(self, points: Floats, low: Floats) -> Floats:
        """Points in cells from the low end of each axis."""
        found: Floats = (points - low) / (math.sqrt(2) * self.bandwidth)
        return found

    def _padded(self, places: Floats) -> Floats:
        out = np.zeros((len(places), 3))
        out[:, : self.dims] = places
        return out

    def _axes(self) -> tuple[Integers, Integers, npt.NDArray[np.bool_]]:
        lacking = 3 - self.dims
        counts = np.array([*self.counts, *[1] * lacking], dtype=np.int64)
        orders = np.array([self.order] * self.dims + [1] * lacking, dtype=np.int64)
        return counts, orders, np.arange(3) >= self.dims

    def _indices(self) -> Integers:
        grids = np.indices((self.order,) * self.dims).reshape(self.dims, -1)
        return grids.T

    def _shares(self, law: Law) -> list[Fraction]:
        one = np.array([2.0 ** (-k / 2) / math.sqrt(math.factorial(k)) for k in range(self.order)])
        errors = np.prod(one[self._indices()], axis=1)
        return split(errors.tolist(), law)
