"""Backurs' ring tree: counts alone, in rings of geometrically falling distance around the query.

A record at distance d is counted as the outer radius of its ring, at most (1 + alpha) d: sums are too large by up to
alpha, however many records there are and however large the budget.
Source: Backurs et al. (2024), "Efficiently computing similarities to private datasets", ICLR; arXiv:2403.08917.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from assay.privacy.kde import piecewise_numba as compiled
from assay.privacy.kde.blocks import Arrays, Block, Law, block, even
from assay.privacy.kde.frame import Floats, Frame
from assay.privacy.kde.trees import columns_of
from assay.privacy.noise import Integers


@dataclass(frozen=True, kw_only=True)
class RingTree:
    """Counts of every node, all levels alike; each ring is a difference of two prefixes of the tree.

    Attributes
    ----------
    dims, depth, bits
        As for `CentredTree`.
    alpha
        Positive: rings end at R / (1 + alpha)**j.
    """

    name: ClassVar[str] = "rings"

    dims: int
    depth: int
    alpha: float = 0.1
    bits: int = 24

    @property
    def rings(self) -> int:
        """How many rings on each side: the innermost reaches down to less than a leaf."""
        return math.ceil(self.depth * math.log(2) / math.log1p(self.alpha)) + 1

    def blocks(self, law: Law, amount: Fraction) -> tuple[Block, ...]:
        """One block for every level."""
        (share, *_) = even(self.depth)
        return tuple(
            block("count", columns_of(level), l1=self.dims, squared=self.dims, share=share, law=law, amount=amount)
            for level in range(1, self.depth + 1)
        )

    def factor(self, law: Law) -> Fraction:
        """At most two nodes of a level change, by one each."""
        return Fraction(2)

    def sums(self, cells: Integers) -> Arrays:
        """Exact counts of every node."""
        out = np.zeros((self.dims, columns_of(self.depth)[1]), dtype=np.int64)
        for j in range(self.dims):
            compiled.add_moments(
                np.ascontiguousarray(cells[:, j]),
                self.bits,
                self.depth,
                np.zeros((0, self.depth), np.int64),
                out[j : j + 1],
            )
        return {"count": out}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of `sums`."""
        return {"count": (self.dims, columns_of(self.depth)[1])}

    def prepare(self, arrays: Arrays, frame: Frame) -> tuple[Floats, ...]:
        """Prefix sums of the leaves: origin, span, table."""
        table = np.stack([compiled.prefixes(row.astype(np.float64), self.depth) for row in arrays["count"]])
        return frame.origin(self.bits), frame.span(self.bits), table

    def answers(self, prepared: tuple[Floats, ...], points: Floats) -> Floats:
        """Sums over records of |x - y|_1, shape (m,)."""
        found: Floats = compiled.ring_answers(points, *prepared, 1 + self.alpha, self.rings)
        return found

    def variance(self, blocks: tuple[Block, ...], frame: Frame, points: Floats) -> Floats:
        """Variance of the noise in each answer, shape (m,)."""
        found: Floats = compiled.ring_variance(
            points,
            frame.origin(self.bits),
            frame.span(self.bits),
            self.depth,
            blocks[0].variance,
            1 + self.alpha,
            self.rings,
        )
        return found

    def bias(self, n: int, frame: Frame, density: float | None) -> float:
        """Most that rings, leaves and the grid can add: alpha of the largest sum, and a leaf at both ends."""
        return float((n * (self.alpha + 2.0 ** (1 - self.depth)) * frame.width).sum())
