"""Even powers of distances from moments alone: no tree, for |x - y|^p is a polynomial in x everywhere.

Per coordinate the sums of xi^k, k = 1 .. p - 1, with xi in [-1, 1] the record's place between the bounds; one number
for all p-th powers together; the count. For p = 2 that is d + 2 numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from assay.privacy.kde.blocks import Arrays, Block, Law, block, split
from assay.privacy.kde.frame import Floats, Frame
from assay.privacy.noise import Integers

_ONE = 2**24  # an integer moment of 1


@dataclass(frozen=True, kw_only=True)
class EvenMoments:
    """Sums of powers of every coordinate.

    Attributes
    ----------
    power
        Even p of |x - y|^p.
    halves
        Half widths of the public intervals; they set how the budget is split.
    bits
        Of the grid.
    """

    name: ClassVar[str] = "moments"

    power: int
    halves: tuple[float, ...]
    bits: int = 24

    @property
    def dims(self) -> int:
        """Coordinates."""
        return len(self.halves)

    def blocks(self, law: Law, amount: Fraction) -> tuple[Block, ...]:
        """The count, the p-th powers, and one block for every power between, over all coordinates."""
        names = ["count", "top"] + ["moments"] * (self.power - 1)
        found = []
        for i, (name, share) in enumerate(zip(names, self._shares(law), strict=True)):
            one = 1 if name == "count" else _ONE
            many = self.dims if name == "moments" else 1
            column = i - 2 if name == "moments" else 0
            found.append(
                block(
                    name,
                    (column, column + 1),
                    l1=many * one,
                    squared=many * one**2,
                    share=share,
                    law=law,
                    amount=amount,
                )
            )
        return tuple(found)

    def factor(self, law: Law) -> Fraction:
        """A replacement leaves the count, moves even moments by at most their bound, odd ones by at most twice it."""
        moved = [0, 1] + [2 if k % 2 else 1 for k in range(1, self.power)]
        shares = self._shares(law)
        worst = sum(
            (share * (m if law == "laplace" else m * m) for share, m in zip(shares, moved, strict=True)), Fraction(0)
        )
        return max(Fraction(1), worst)

    def sums(self, cells: Integers) -> Arrays:
        """Exact sums; each record's powers are integers before they are added."""
        top = 2**self.bits - 1
        place = (2 * cells - top) / top  # (n, d), in [-1, 1]
        weights = np.array(self.halves) ** self.power
        weights = weights / weights.sum()
        moments = np.zeros((self.dims, self.power - 1), dtype=np.int64)
        value = np.ones_like(place)
        for k in range(1, self.power):
            # Products of numbers of at most 1 are at most 1 after rounding too, and so are the integers at most _ONE.
            value = value * place
            moments[:, k - 1] = np.rint(value * _ONE).astype(np.int64).sum(axis=0)
        # By a sum along each row, not by a matrix product, whose rounding of a row depends on the others.
        highest = np.minimum((value * place * weights).sum(axis=1), 1.0)
        total = np.rint(highest * _ONE).astype(np.int64).sum()
        return {
            "count": np.array([[len(cells)]], dtype=np.int64),
            "top": np.array([[total]], dtype=np.int64),
            "moments": moments,
        }

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of `sums`."""
        return {"count": (1, 1), "top": (1, 1), "moments": (self.dims, self.power - 1)}

    def prepare(self, arrays: Arrays, frame: Frame) -> tuple[Floats, ...]:
        """A polynomial for each coordinate, and the constant: low, half, coefficients of u^1 .. u^p, constant."""
        half = np.array(self.halves)
        table = np.zeros((self.dims, self.power))
        table[:, self.power - 1] = arrays["count"][0, 0]
        for k in range(1, self.power):
            table[:, self.power - k - 1] = (-1) ** k * math.comb(self.power, k) * arrays["moments"][:, k - 1] / _ONE
        constant = np.array([float(arrays["top"][0, 0]) / _ONE * (half**self.power).sum()])
        return frame.low, half, table, constant

    def answers(self, prepared: tuple[Floats, ...], points: Floats) -> Floats:
        """Sums over records of |x - y|_p^p, shape (m,)."""
        low, half, table, constant = prepared
        u = (points - low) / half - 1
        value = np.zeros_like(u)
        for k in range(self.power - 1, -1, -1):
            value = (value + table[:, k]) * u
        found: Floats = value @ half**self.power + constant[0]
        return found

    def variance(self, blocks: tuple[Block, ...], frame: Frame, points: Floats) -> Floats:
        """Variance of the noise in each answer, shape (m,)."""
        half = np.array(self.halves)
        u = (points - frame.low) / half - 1
        scale = half**self.power
        count, top, *middle = blocks
        found: Floats = count.variance * (u**self.power @ scale) ** 2
        found = found + top.variance / _ONE**2 * scale.sum() ** 2
        for k, one in enumerate(middle, 1):
            term = math.comb(self.power, k) * u ** (self.power - k) * scale
            found = found + one.variance / _ONE**2 * (term**2).sum(axis=1)
        return found

    def bias(self, n: int, frame: Frame) -> float:
        """Most that the grid and rounding can add, for queries between the bounds."""
        scale = frame.width**self.power
        grid = self.power * 2.0 ** -(self.bits + 1)
        return float(n * scale.sum() * (grid + 2.0**self.power / (2 * _ONE)))

    def _shares(self, law: Law) -> list[Fraction]:
        half = np.array(self.halves)
        scale = half**self.power
        # Noise of a block over d coordinates grows like d (Laplace) or sqrt d (Gaussian) for each of them.
        each = self.dims if law == "laplace" else math.sqrt(self.dims)
        errors = [scale.sum() / math.sqrt(2 * self.power + 1), scale.sum()]
        for k in range(1, self.power):
            spread = math.comb(self.power, k) / math.sqrt(2 * (self.power - k) + 1)
            errors.append(spread * each * math.sqrt((scale**2).sum()))
        return split(errors, law)
