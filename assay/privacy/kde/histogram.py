"""The baseline: one histogram of each coordinate, every record counted as if it lay in the middle of its bin.

With few bins the noise is small and the bias large: the best of the four constructions for few records or a small
budget, and the worst for many records that lie close together.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from assay.privacy.kde import piecewise_numba as compiled
from assay.privacy.kde.blocks import Arrays, Block, Law, block
from assay.privacy.kde.frame import Floats, Frame
from assay.privacy.noise import Integers


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of 2**depth bins.

    Attributes
    ----------
    dims, bits
        As for `CentredTree`.
    depth
        Logarithm of the number of bins.
    """

    name: ClassVar[str] = "histogram"

    dims: int
    depth: int
    bits: int = 24

    def blocks(self, law: Law, amount: Fraction) -> tuple[Block, ...]:
        """One block: a record is in one bin of each coordinate."""
        one = block(
            "count", (0, 2**self.depth), l1=self.dims, squared=self.dims, share=Fraction(1), law=law, amount=amount
        )
        return (one,)

    def factor(self, law: Law) -> Fraction:
        """Two bins change, by one each."""
        return Fraction(2)

    def sums(self, cells: Integers) -> Arrays:
        """Exact counts."""
        leaves = cells >> (self.bits - self.depth)
        rows = [np.bincount(leaves[:, j], minlength=2**self.depth) for j in range(self.dims)]
        return {"count": np.array(rows, dtype=np.int64)}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of `sums`."""
        return {"count": (self.dims, 2**self.depth)}

    def prepare(self, arrays: Arrays, frame: Frame) -> tuple[Floats, ...]:
        """A line between each two neighbouring middles: origin, width, scale, table."""
        counts = arrays["count"].astype(np.float64)
        bins = 2**self.depth
        middles = 2.0 * np.arange(bins)  # in half bins from the first middle
        below = np.concatenate([np.zeros((self.dims, 1)), np.cumsum(counts, axis=1)], axis=1)
        moment = np.concatenate([np.zeros((self.dims, 1)), np.cumsum(counts * middles, axis=1)], axis=1)
        slope = 2 * below - below[:, -1:]
        centre = 2.0 * np.arange(-1, bins) + 1  # of segment s, which ends at middle s
        level = slope * centre - (2 * moment - moment[:, -1:])
        width = frame.span(self.bits) / bins
        origin = frame.origin(self.bits) + width / 2
        return origin, width, width / 2, np.stack([level, slope], axis=2)

    def answers(self, prepared: tuple[Floats, ...], points: Floats) -> Floats:
        """Sums over records of |x - y|_1, shape (m,)."""
        found: Floats = compiled.evaluate(points, *prepared)
        return found

    def variance(self, blocks: tuple[Block, ...], frame: Frame, points: Floats) -> Floats:
        """Variance of the noise in each answer, shape (m,): sum over bins of (middle - y)^2."""
        bins = 2**self.depth
        width = frame.span(self.bits) / bins
        place = (points - frame.origin(self.bits)) / width - bins / 2  # from the middle of the interval, in bins
        spread = bins * (bins**2 - 1) / 12  # of the middles around their mean
        found: Floats = (blocks[0].variance * (spread + bins * place**2) * width**2).sum(axis=1)
        return found

    def bias(self, n: int, frame: Frame, density: float | None) -> float:
        """Most that bins and the grid can add: half a bin for each record.

        Where the density is at most `density` times uniform, only records of the query's own bin count, of which
        (1/2 - |t|)^2 bins remain each, t the query's place in the bin; 80^(-1/2) root mean square over t.
        """
        bins = 2**self.depth
        each = 0.5 / bins
        if density is not None:
            each = min(each, density / bins**2 / 80**0.5)
        return float((n * (each + 2.0 ** -(self.bits + 1)) * frame.width).sum())
