"""L2KDE: sums of Euclidean distances, by Gaussian projections to lines and one tree for each line.

|v|_2 = sqrt(pi / 2) E|g . v| for g standard normal. Guarantee: epsilon-DP or rho-zCDP, as in `release`: the projections
are public, and every projected record is clamped to a public interval, without which one record could move a tree by
any amount.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Adjacency, Unit
from assay.privacy.kde.blocks import Arrays, Block
from assay.privacy.kde.frame import Clamping, Floats, Frame, as_points
from assay.privacy.kde.l1 import choose_law, deep_enough, error_of, spread_error
from assay.privacy.kde.projection_numba import project
from assay.privacy.kde.release import Plan, Release, check_count, check_size, plan_of
from assay.privacy.kde.trees import CentredTree
from assay.privacy.noise import Real

_BITS = 24
_PROJECTIONS = (16, 32, 64, 128, 256)
_DEPTHS = range(6, 18)
# Standard deviation of sqrt(pi / 2) |g| for g standard normal.
_SPREAD = math.sqrt(math.pi / 2 - 1)


class L2KDE(Release):
    """Noisy sums f(y) = sum over records x of |x - y|_2, for any y.

    Parameters
    ----------
    radius
        Public bound: records farther than this from `centre` are moved to the ball, and counted as clamped.
    centre
        Public centre of the ball, a number or `dims` of them.
    dims, n, epsilon, delta, rho, adjacency, unit, law
        As for `L1KDE`.
    projections
        Lines, or None for the best power of two from 16 to 256. More lines mean less sampling error; under Laplace
        noise they cost its square root in noise, under Gaussian noise nothing but time and memory.
    beta
        Chance, over the projections, that a record at the edge of the ball is clamped on any line; in (0, 1/2].
    seed
        Of the projections; public, chosen without looking at the data.

    Attributes
    ----------
    plan_, seeded
        As for `L1KDE`. `plan_.approximation` has the standard deviation over projections at a distance of `radius`
        from all records: at most sqrt(pi / 2 - 1) f(y) / sqrt(projections) for any data.
    clamping_
        Values are projected values moved to the interval, records those moved to the ball; private.
    """

    _DESIGNS: ClassVar[dict[str, Any]] = {CentredTree.name: CentredTree}

    def __init__(
        self,
        *,
        radius: float,
        dims: int,
        n: int,
        adjacency: Adjacency,
        unit: Unit,
        centre: npt.ArrayLike = 0.0,
        epsilon: Real | None = None,
        delta: float = 0.0,
        rho: Real | None = None,
        law: Literal["auto", "laplace", "gaussian"] = "auto",
        projections: int | None = None,
        beta: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.radius = radius
        self.dims = dims
        self.n = n
        self.adjacency = adjacency
        self.unit = unit
        self.centre = centre
        self.epsilon = epsilon
        self.delta = delta
        self.rho = rho
        self.law = law
        self.projections = projections
        self.beta = beta
        self.seed = seed

    def plan(self) -> Plan:
        """What `fit` would release and cost: the number of lines and the law with the smallest error."""
        n = check_count(self.n, "n")
        check_count(self.dims, "dims", most=100_000)
        check_count(self.seed, "seed", least=0, most=2**32 - 1)
        self._middle()
        if not (np.isfinite(self.radius) and self.radius > 0):
            raise ValueError(f"radius must be positive and finite, got {self.radius}.")
        if not 0 < self.beta <= 0.5:
            raise ValueError(f"beta must be in (0, 1/2], got {self.beta}.")
        if self.projections is not None:
            check_count(self.projections, "projections", most=4096)
        plans = []
        for terms in choose_law(self._terms(), self.law):
            for lines in _PROJECTIONS if self.projections is None else (int(self.projections),):
                frame = self._lines_frame(lines)
                weight = math.sqrt(math.pi / 2) / lines
                sampling = _SPREAD * n * float(self.radius) / math.sqrt(lines)
                trees = (CentredTree(dims=lines, depth=depth, bits=_BITS) for depth in _DEPTHS)
                # Leaves first: they are made small beside the noise, whatever the sampling error is.
                deep = deep_enough(
                    plan_of(tree, terms, partial(_weighted_error, tree, frame=frame, weight=weight), leaves)
                    for tree in trees
                    for leaves in [weight * tree.bias(n, frame, None)]
                )
                plans.append(replace(deep, approximation=math.hypot(sampling, deep.approximation)))
        return min(plans, key=error_of)

    def _integers(self, plan: Plan, points: npt.ArrayLike) -> tuple[Arrays, Clamping]:
        # An infinite record has no direction to project along.
        records = as_points(points, int(self.dims), "points", finite=True) - self._middle()
        check_size(len(records))
        lengths = np.linalg.norm(records, axis=1)
        outside = lengths > self.radius
        records[outside] *= (self.radius / lengths[outside])[:, None]
        cells, clamping = self._lines_frame(plan.design.dims).cells(
            project(np.ascontiguousarray(records), self._directions(plan.design.dims)), plan.design.bits
        )
        return plan.design.sums(cells), Clamping(clamping.values, int(outside.sum()))

    def _queries(self, points: npt.ArrayLike) -> Floats:
        queries = as_points(points, int(self.dims), "points", finite=True) - self._middle()
        found: Floats = np.ascontiguousarray(queries @ self._directions(self.plan_.design.dims))
        return found

    def _frame(self) -> Frame:
        return self._lines_frame(self.plan_.design.dims)

    def _lines_frame(self, lines: int) -> Frame:
        # A projection of a record of length at most r is normal with deviation at most r.
        reach = float(self.radius) * math.sqrt(2 * math.log(2 * lines / self.beta))
        return Frame.make(-reach, reach, lines)

    def _weight(self) -> float:
        return math.sqrt(math.pi / 2) / int(self.plan_.design.dims)

    def _directions(self, lines: int) -> Floats:
        return directions(int(self.dims), lines, int(self.seed))

    def _middle(self) -> Floats:
        centre = np.asarray(self.centre)
        if centre.dtype.kind not in "iuf" or centre.shape not in ((), (self.dims,)) or not np.isfinite(centre).all():
            raise ValueError(f"centre must be a finite number or {self.dims} of them, got shape {centre.shape}.")
        return centre.astype(np.float64)


def _weighted_error(tree: CentredTree, blocks: tuple[Block, ...], frame: Frame, weight: float) -> float:
    return weight * spread_error(tree, blocks, frame)


@lru_cache(maxsize=8)
def directions(dims: int, count: int, seed: int) -> Floats:
    """Standard normal columns, shape (dims, count), the same for a seed in every version of numpy."""
    # RandomState's streams are frozen by numpy's policy; those of Generator may change, and saved files need them.
    found: Floats = np.ascontiguousarray(np.random.RandomState(seed).standard_normal((count, dims)).T)
    found.flags.writeable = False  # shared between calls
    return found
