"""Random Fourier features of the Gaussian kernel, released as one vector of sums.

k(x, y) = E cos(w . (x - y)) for w normal with deviation 1 / bandwidth. With cosine and sine of the same w, every pair
of features has length 1: the sum over pairs has l2 sensitivity sqrt(pairs), and each answer reads the noise with
weights of length 1 / sqrt(pairs), so that Gaussian noise on an answer does not depend on the number of pairs.
Sources: Rahimi, Recht (2007); Wagner, Naamad, Mishra (2023), LSQ (Laplace); Hall, Rinaldo, Wasserman
(2013), arXiv:1203.2570 (Gaussian).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from assay.privacy.kde.blocks import Arrays, Block, Law, block
from assay.privacy.kde.frame import Floats
from assay.privacy.kde.l2 import directions
from assay.privacy.kde.projection_numba import project

_BITS = 24
_CHUNK = 2**22  # features in memory at once


@dataclass(frozen=True, kw_only=True)
class FourierFeatures:
    """Sums of cosines and sines.

    Attributes
    ----------
    dims
        Coordinates.
    pairs
        Frequencies.
    bandwidth
        h of exp(-|x - y|^2 / (2 h^2)).
    seed
        Of the frequencies, public.
    """

    name: ClassVar[str] = "features"

    dims: int
    pairs: int
    bandwidth: float
    seed: int

    def blocks(self, law: Law, amount: Fraction) -> tuple[Block, ...]:
        """One block. A record's pair is (a cos, a sin) cut towards zero, with a = 2**24.

        Its squares add up to at most a^2 and its magnitudes to at most floor(sqrt(2) a): both are integers, and the
        error of the library's cosine and sine, a few parts in 2**52, moves the real bounds by less than one.
        """
        squared = self.pairs * 4**_BITS
        l1 = self.pairs * math.isqrt(2 * 4**_BITS)
        columns = (0, 2 * self.pairs)
        return (block("features", columns, l1=l1, squared=squared, share=Fraction(1), law=law, amount=amount),)

    def factor(self, law: Law) -> Fraction:
        """A record goes and another comes: twice the length, so four times the rho."""
        return Fraction(2) if law == "laplace" else Fraction(4)

    def sums(self, points: Floats) -> Arrays:
        """Exact sums of integer features."""
        out = np.zeros((1, 2 * self.pairs), dtype=np.int64)
        rows = max(1, _CHUNK // (2 * self.pairs))
        for start in range(0, len(points), rows):
            values = self._features(points[start : start + rows])
            out[0] += np.trunc(values * 2.0**_BITS).astype(np.int64).sum(axis=0)
        return {"features": out}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of `sums`."""
        return {"features": (1, 2 * self.pairs)}

    def prepare(self, arrays: Arrays, frame: Any) -> tuple[Floats, ...]:
        """The sums, divided so that their product with a query's features is the answer."""
        return (arrays["features"][0] / (2.0**_BITS * self.pairs),)

    def answers(self, prepared: tuple[Floats, ...], points: Floats) -> Floats:
        """Sums over records of the kernel, shape (m,)."""
        out = np.empty(len(points))
        rows = max(1, _CHUNK // (2 * self.pairs))
        for start in range(0, len(points), rows):
            out[start : start + rows] = self._features(points[start : start + rows]) @ prepared[0]
        return out

    def variance(self, blocks: tuple[Block, ...], frame: Any, points: Floats) -> Floats:
        """Variance of the noise in each answer, shape (m,): the same everywhere."""
        return np.full(len(points), blocks[0].variance / (4.0**_BITS * self.pairs))

    def bias(self, n: int) -> float:
        """Standard deviation over frequencies, at most: of the mean of `pairs` cosines, times n; and truncation."""
        return n / math.sqrt(2 * self.pairs) + 2 * n * 2.0**-_BITS

    def _features(self, points: Floats) -> Floats:
        """Cosines and sines, (n, 2 pairs); those of a record depend on nothing but the record."""
        frequencies = np.ascontiguousarray(directions(self.dims, self.pairs, self.seed) / self.bandwidth)
        found = np.empty((len(points), 2 * self.pairs))
        for angles, row in zip(project(np.ascontiguousarray(points), frequencies), found, strict=True):
            # Row by row: in a long vector an angle's neighbours may decide how its cosine is rounded.
            np.cos(angles, out=row[: self.pairs])
            np.sin(angles, out=row[self.pairs :])
        return found
