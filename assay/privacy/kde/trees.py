"""Trees over a public interval: the centred geometric tree, and the published refined tree (counts and sums).

A record adds to one node of every level but the root, which no query reads. A query walks to its leaf; the siblings of
its path hold all other records, each sibling wholly on one side, so that |x - y|^p is a polynomial in x there.
Sources: refined tree: Liu et al. (2024), arXiv:2409.01688. The centred tree, its split of the budget and its error are
derived in docs/explanation/privacy-kde.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from assay.privacy.kde import piecewise_numba as compiled
from assay.privacy.kde.blocks import Arrays, Block, Law, block, even, split
from assay.privacy.kde.frame import Floats, Frame
from assay.privacy.noise import Integers

# Moments beyond the first are counted in units that leave this many bits.
_MOMENT_BITS = 20


def columns_of(level: int) -> tuple[int, int]:
    """Where the nodes of a level stand."""
    return 2**level - 2, 2 ** (level + 1) - 2


@dataclass(frozen=True, kw_only=True)
class CentredTree:
    """Counts and centred moments up to `power` of every node; geometric split of the budget.

    Offsets from the middle of a node shrink with the node, and with them the noise that hides them: the error is a
    geometric series over the levels and does not grow with the depth or the number of records.

    Attributes
    ----------
    dims
        Coordinates; each has its own tree and an equal part of the budget.
    depth
        Levels, in [1, 24].
    power
        Odd p of |x - y|^p.
    bits
        Of the grid; more than `depth`.
    """

    name: ClassVar[str] = "centred"

    dims: int
    depth: int
    power: int = 1
    bits: int = 24

    def blocks(self, law: Law, amount: Fraction) -> tuple[Block, ...]:
        """One block for every level and moment."""
        shares = iter(split(self._errors(), law))
        found = []
        for level in range(1, self.depth + 1):
            for k in range(self.power + 1):
                bound = self._bound(level, k)
                found.append(
                    block(
                        f"moment{k}",
                        columns_of(level),
                        l1=self.dims * bound,
                        squared=self.dims * bound**2,
                        share=next(shares),
                        law=law,
                        amount=amount,
                    )
                )
        return tuple(found)

    def factor(self, law: Law) -> Fraction:
        """How much more than one record's coming or going a replacement can lose.

        In two nodes of a level both change: twice. In one node the count stays, even moments move by at most their
        bound and odd ones by twice that, whose square may be the larger bound under rho where p is large.
        """
        if law == "laplace":
            return Fraction(2)
        shares = split(self._errors(), law)
        worst = Fraction(2)
        width = self.power + 1
        for level in range(self.depth):
            here = shares[level * width : (level + 1) * width]
            moved = sum((here[k] * (4 if k % 2 else 1) for k in range(1, width)), Fraction(0))
            worst = max(worst, moved / sum(here, Fraction(0)))
        return worst

    def sums(self, cells: Integers) -> Arrays:
        """Exact integers of every node."""
        out = np.zeros((self.dims, self.power + 1, columns_of(self.depth)[1]), dtype=np.int64)
        shifts = np.array(
            [[self._shift(level, k) for level in range(1, self.depth + 1)] for k in range(1, self.power + 1)]
        )
        for j in range(self.dims):
            compiled.add_moments(np.ascontiguousarray(cells[:, j]), self.bits, self.depth, shifts, out[j])
        return {f"moment{k}": out[:, k] for k in range(self.power + 1)}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of `sums`."""
        return {f"moment{k}": (self.dims, columns_of(self.depth)[1]) for k in range(self.power + 1)}

    def prepare(self, arrays: Arrays, frame: Frame) -> tuple[Floats, ...]:
        """Polynomials of all leaves: origin, width, scale, table."""
        moments = np.stack([arrays[f"moment{k}"] for k in range(self.power + 1)], axis=1).astype(np.float64)
        for level in range(1, self.depth + 1):
            for k in range(1, self.power + 1):
                moments[:, k, slice(*columns_of(level))] *= self._unit(level, k)
        table = np.stack([compiled.leaf_polynomials(one, self.depth, self._own()) for one in moments])
        width = frame.span(self.bits) / 2**self.depth
        return frame.origin(self.bits), width, (width / 2) ** self.power, table

    def answers(self, prepared: tuple[Floats, ...], points: Floats) -> Floats:
        """Sums over records of |x - y|_p^p, shape (m,)."""
        found: Floats = compiled.evaluate(points, *prepared)
        return found

    def variance(self, blocks: tuple[Block, ...], frame: Frame, points: Floats) -> Floats:
        """Variance of the noise in each answer, shape (m,)."""
        levels = np.array([one.variance for one in blocks]).reshape(self.depth, self.power + 1)
        for level in range(1, self.depth + 1):
            for k in range(1, self.power + 1):
                levels[level - 1, k] *= self._unit(level, k) ** 2
        span = frame.span(self.bits)
        found: Floats = compiled.centred_variance(
            points, frame.origin(self.bits), span, (span / 2) ** self.power, levels, self._own()
        )
        return found

    def bias(self, n: int, frame: Frame, density: float | None) -> float:
        """Most that leaves and the grid can add to an answer about `n` records.

        A record of the query's own leaf is at distance 0 to 2 h, and is counted as E|u - xi|^p h^p. Where the density
        is at most `density` times uniform, so many records are in one leaf at most.
        """
        own = self._own() / 2**self.power
        held = 1.0 if density is None else min(1.0, density / 2**self.depth)
        leaf = n * held * max(own, 1 - own) * (frame.span(self.bits) / 2**self.depth) ** self.power
        grid = n * self.power * frame.width**self.power * 2.0 ** -(self.bits + 1)
        return float((leaf + grid).sum())

    def _own(self) -> float:
        # E|u - xi|^p for two independent uniform points of [-1, 1].
        return float(2 ** (self.power + 1) / ((self.power + 1) * (self.power + 2)))

    def _errors(self) -> list[float]:
        """What noise of one sensitivity in a moment is worth in an answer, root mean square over queries."""
        found = []
        for level in range(1, self.depth + 1):
            for k in range(self.power + 1):
                j = self.power - k
                apart = math.sqrt((3 ** (2 * j + 1) - 1) / (2 * (2 * j + 1)))  # of (u + 2)^j, u uniform on [-1, 1]
                found.append(math.comb(self.power, k) * apart * 2.0 ** (-self.power * level))
        return found

    def _bound(self, level: int, k: int) -> int:
        """How far one record moves moment k of its node."""
        size: int = 2 ** (self.bits - level)
        return size - 1 if k == 1 else size**k // 2 ** self._shift(level, k)

    def _shift(self, level: int, k: int) -> int:
        return 0 if k == 1 else max(0, (self.bits - level) * k - _MOMENT_BITS)

    def _unit(self, level: int, k: int) -> float:
        """One integer of moment k, in units of h_l**k."""
        return float(2.0 ** (self._shift(level, k) - (self.bits - level) * k))


@dataclass(frozen=True, kw_only=True)
class RefinedTree:
    """The published refined tree: counts and coordinate sums, all levels alike.

    Half of the budget is for counts, half for sums, and each level has an equal part: spending the whole on both arrays
    would be twice the budget. The noise of a sum has the size of the whole interval whatever the size of its node.

    Attributes
    ----------
    dims, depth, bits
        As for `CentredTree`.
    """

    name: ClassVar[str] = "refined"

    dims: int
    depth: int
    bits: int = 24

    def blocks(self, law: Law, amount: Fraction) -> tuple[Block, ...]:
        """One block for every level, of counts and of sums."""
        (share, *_) = even(2 * self.depth)
        top = 2**self.bits - 1
        return tuple(
            block(
                name,
                columns_of(level),
                l1=self.dims * bound,
                squared=self.dims * bound**2,
                share=share,
                law=law,
                amount=amount,
            )
            for level in range(1, self.depth + 1)
            for name, bound in (("count", 1), ("sum", top))
        )

    def factor(self, law: Law) -> Fraction:
        """Two nodes change; where they are one, its sum moves by at most its bound, for coordinates start at 0."""
        return Fraction(2)

    def sums(self, cells: Integers) -> Arrays:
        """Exact integers of every node."""
        out = np.zeros((self.dims, 2, columns_of(self.depth)[1]), dtype=np.int64)
        for j in range(self.dims):
            leaves = cells[:, j] >> (self.bits - self.depth)
            first = columns_of(self.depth)[0]
            np.add.at(out[j, 0], first + leaves, 1)
            np.add.at(out[j, 1], first + leaves, cells[:, j])
            for level in range(self.depth - 1, 0, -1):
                start, stop = columns_of(level)
                children = out[j, :, slice(*columns_of(level + 1))]
                out[j, :, start:stop] = children[:, 0::2] + children[:, 1::2]
        return {"count": out[:, 0], "sum": out[:, 1]}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of `sums`."""
        return {name: (self.dims, columns_of(self.depth)[1]) for name in ("count", "sum")}

    def prepare(self, arrays: Arrays, frame: Frame) -> tuple[Floats, ...]:
        """Polynomials of all leaves: origin, width, scale, table."""
        counts, sums = arrays["count"].astype(np.float64), arrays["sum"].astype(np.float64)
        offsets = np.empty_like(sums)
        for level in range(1, self.depth + 1):
            where = slice(*columns_of(level))
            size = 2.0 ** (self.bits - level)
            centre = (2 * np.arange(2**level) + 1) * size - 1
            offsets[:, where] = (2 * sums[:, where] - counts[:, where] * centre) / size
        table = np.stack(
            [compiled.leaf_polynomials(np.stack(pair), self.depth, 0.0) for pair in zip(counts, offsets, strict=True)]
        )
        width = frame.span(self.bits) / 2**self.depth
        return frame.origin(self.bits), width, width / 2, table

    def answers(self, prepared: tuple[Floats, ...], points: Floats) -> Floats:
        """Sums over records of |x - y|_1, shape (m,)."""
        found: Floats = compiled.evaluate(points, *prepared)
        return found

    def variance(self, blocks: tuple[Block, ...], frame: Frame, points: Floats) -> Floats:
        """Variance of the noise in each answer, shape (m,): of c y - s for each sibling on the path."""
        count, total = blocks[0].variance, blocks[1].variance
        step = frame.step(self.bits)
        place = (points - frame.low) / step
        outside = (points < frame.origin(self.bits)) | (points >= frame.origin(self.bits) + frame.span(self.bits))
        siblings = np.where(outside, 2, self.depth)
        found: Floats = (siblings * (count * place**2 + total) * step**2).sum(axis=1)
        return found

    def bias(self, n: int, frame: Frame, density: float | None) -> float:
        """Most that leaves and the grid can add: records of the query's own leaf are not counted."""
        held = 1.0 if density is None else min(1.0, density / 2**self.depth)
        return float((n * (held / 2**self.depth + 2.0 ** -(self.bits + 1)) * frame.width).sum())


def check_depth(depth: object, bits: int, argument: str = "depth") -> int:
    """A number of levels that the grid can carry."""
    if isinstance(depth, bool) or not isinstance(depth, int | np.integer) or not 1 <= depth < bits:
        raise ValueError(f"{argument} must be an integer in [1, {bits - 1}], got {depth!r}.")
    return int(depth)
