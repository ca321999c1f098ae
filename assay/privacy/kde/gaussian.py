"""GaussianKDE: sums of the Gaussian kernel, by random Fourier features or, in up to three dimensions, by cells.

Guarantee: epsilon-DP or rho-zCDP, as in `release`. The bandwidth is public: one chosen by looking at the records voids
the guarantee, unless that choice was itself made privately and paid for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Adjacency, Unit
from assay.privacy.kde.blocks import Arrays, Block, Terms
from assay.privacy.kde.cells import GaussCells
from assay.privacy.kde.fourier import FourierFeatures
from assay.privacy.kde.frame import Clamping, Floats, Frame, as_points
from assay.privacy.kde.l1 import choose_law, deep_enough, error_of, spread_error
from assay.privacy.kde.release import Plan, Release, check_count, check_size, plan_of
from assay.privacy.noise import Real

_PAIRS = (64, 4096)
_ORDERS = range(3, 17)
_MAX_CELLS = 2**22


class GaussianKDE(Release):
    """Noisy sums f(y) = sum over records x of exp(-|x - y|^2 / (2 bandwidth^2)), for any y.

    Parameters
    ----------
    bandwidth
        Public, positive.
    dims, n, epsilon, delta, rho, adjacency, unit, law
        As for `L1KDE`.
    construction
        "features", "cells", or "auto": the one with the smaller error, by these settings alone. Cells need up to three
        dimensions, bounds, and at most 2**22 released integers.
    low, high
        Public bounds of the records, only for cells; records outside are moved to them. Features need none: cosines
        are bounded wherever a record is.
    pairs
        Frequencies, or None for the best number from 64 to 4,096.
    seed
        Of the frequencies; public, chosen without looking at the data.

    Attributes
    ----------
    plan_, clamping_, seeded
        As for `L1KDE`. For features `plan_.approximation` is a standard deviation over frequencies, for cells a bound.

    References
    ----------
    Wagner, Naamad, Mishra (ICML 2023); Hall, Rinaldo, Wasserman (2013), arXiv:1203.2570.
    """

    _DESIGNS: ClassVar[dict[str, Any]] = {one.name: one for one in (FourierFeatures, GaussCells)}

    def __init__(
        self,
        *,
        bandwidth: float,
        dims: int,
        n: int,
        adjacency: Adjacency,
        unit: Unit,
        epsilon: Real | None = None,
        delta: float = 0.0,
        rho: Real | None = None,
        law: Literal["auto", "laplace", "gaussian"] = "auto",
        construction: Literal["auto", "features", "cells"] = "auto",
        low: npt.ArrayLike | None = None,
        high: npt.ArrayLike | None = None,
        pairs: int | None = None,
        seed: int = 0,
    ) -> None:
        self.bandwidth = bandwidth
        self.dims = dims
        self.n = n
        self.adjacency = adjacency
        self.unit = unit
        self.epsilon = epsilon
        self.delta = delta
        self.rho = rho
        self.law = law
        self.construction = construction
        self.low = low
        self.high = high
        self.pairs = pairs
        self.seed = seed

    def plan(self) -> Plan:
        """What `fit` would release and cost.

        Pairs: under Laplace noise the number that makes noise^2 + sampling error^2 least, n epsilon / sqrt(8); under
        Gaussian noise, which does not depend on it, the number that makes sampling error equal to noise. Orders of
        cells: the first whose cut does not exceed the noise.
        """
        n, dims = check_count(self.n, "n"), check_count(self.dims, "dims", most=100_000)
        check_count(self.seed, "seed", least=0, most=2**32 - 1)
        if not (np.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(f"bandwidth must be positive and finite, got {self.bandwidth}.")
        if self.construction not in ("auto", "features", "cells"):
            raise ValueError(f"construction must be 'auto', 'features' or 'cells', got {self.construction!r}.")
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high must be given together, or neither.")
        if self.construction == "cells" and (self.low is None or dims > 3):
            raise ValueError(f"construction 'cells' needs low, high and dims of at most 3, got dims {dims}.")
        plans = []
        for terms in choose_law(self._terms(), self.law):
            if self.construction != "cells":
                features = FourierFeatures(
                    dims=dims, pairs=self._pairs_for(terms, n), bandwidth=float(self.bandwidth), seed=int(self.seed)
                )
                plans.append(plan_of(features, terms, partial(_even_error, features), features.bias(n)))
            if self.construction != "features" and self.low is not None and dims <= 3:
                frame = self._frame()
                grids = list(self._grids(frame))
                if grids:
                    found = (plan_of(one, terms, partial(spread_error, one, frame=frame), one.bias(n)) for one in grids)
                    plans.append(deep_enough(found))
        if not plans:
            raise ValueError(f"bandwidth is too small for cells: more than {_MAX_CELLS:,} integers. Use features.")
        return min(plans, key=error_of)

    def _pairs_for(self, terms: Terms, n: int) -> int:
        if self.pairs is not None:
            return check_count(self.pairs, "pairs", most=2**20)
        factor = FourierFeatures(dims=1, pairs=1, bandwidth=1.0, seed=0).factor(terms.law)
        amount = float(terms.for_one_record(factor))
        best = n * amount / math.sqrt(8) if terms.law == "laplace" else n**2 * amount
        return int(min(max(math.ceil(best), _PAIRS[0]), _PAIRS[1]))

    def _grids(self, frame: Frame) -> Iterator[GaussCells]:
        counts = tuple(math.ceil(width / (math.sqrt(2) * self.bandwidth)) for width in frame.width)
        for order in _ORDERS:
            grid = GaussCells(counts=counts, order=order, bandwidth=float(self.bandwidth))
            if grid.size <= _MAX_CELLS:
                yield grid

    def _integers(self, plan: Plan, points: npt.ArrayLike) -> tuple[Arrays, Clamping]:
        design = plan.design
        features = isinstance(design, FourierFeatures)
        # An infinite record has no angle; between bounds it is moved to one of them.
        records = as_points(points, int(self.dims), "points", finite=features)
        check_size(len(records))
        if features:
            return design.sums(records), Clamping(0, 0)
        frame = self._frame()
        outside = (records < frame.low) | (records > frame.high)
        places = design.places_of(np.clip(records, frame.low, frame.high), frame.low)
        return design.sums(places), Clamping(int(outside.sum()), int(outside.any(axis=1).sum()))

    def _queries(self, points: npt.ArrayLike) -> Floats:
        return as_points(points, int(self.dims), "points", finite=True)

    def _frame(self) -> Any:
        if self.low is None or self.high is None:
            return None
        return Frame.make(self.low, self.high, int(self.dims))


def _even_error(design: FourierFeatures, blocks: tuple[Block, ...]) -> float:
    return float(np.sqrt(design.variance(blocks, None, np.zeros((1, design.dims)))[0]))
