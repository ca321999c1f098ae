"""LpKDE: sums of |x - y|_p^p, for even p by moments and for odd p by a tree of centred moments.

Guarantee: epsilon-DP or rho-zCDP, as in `release`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import numpy.typing as npt

from assay.privacy.accounting import Adjacency, Unit
from assay.privacy.kde.blocks import Arrays
from assay.privacy.kde.frame import Clamping, Floats, Frame, as_points
from assay.privacy.kde.l1 import choose_law, deep_enough, error_of, spread_error
from assay.privacy.kde.moments import EvenMoments
from assay.privacy.kde.release import Plan, Release, check_count, check_size, plan_of
from assay.privacy.kde.trees import CentredTree, check_depth
from assay.privacy.noise import Real

_BITS = 24
_MAX_DEPTH = 20


class LpKDE(Release):
    """Noisy sums f(y) = sum over records x and coordinates i of |x_i - y_i|^p, for any y.

    Parameters
    ----------
    power
        p, in [1, 8]. Even p needs a few moments, odd p a tree; p = 1 is `L1KDE` with the centred tree.
    low, high, dims, n, epsilon, delta, rho, adjacency, unit, law
        As for `L1KDE`.
    depth
        Levels of the tree, for odd p; None sizes it by n, dims and budget.

    Attributes
    ----------
    plan_, clamping_, seeded
        As for `L1KDE`.
    """

    _DESIGNS: ClassVar[dict[str, Any]] = {one.name: one for one in (CentredTree, EvenMoments)}

    def __init__(
        self,
        *,
        power: int,
        low: npt.ArrayLike,
        high: npt.ArrayLike,
        n: int,
        adjacency: Adjacency,
        unit: Unit,
        dims: int = 1,
        epsilon: Real | None = None,
        delta: float = 0.0,
        rho: Real | None = None,
        law: Literal["auto", "laplace", "gaussian"] = "auto",
        depth: int | None = None,
    ) -> None:
        self.power = power
        self.low = low
        self.high = high
        self.n = n
        self.adjacency = adjacency
        self.unit = unit
        self.dims = dims
        self.epsilon = epsilon
        self.delta = delta
        self.rho = rho
        self.law = law
        self.depth = depth

    def plan(self) -> Plan:
        """What `fit` would release and cost; a tree is as deep as for `L1KDE`."""
        power = check_count(self.power, "power", most=8)
        n, dims = check_count(self.n, "n"), check_count(self.dims, "dims", most=100_000)
        frame = self._frame()
        plans = []
        for terms in choose_law(self._terms(), self.law):
            if power % 2 == 0:
                halves = tuple(float(width) / 2 for width in frame.width)
                even = EvenMoments(power=power, halves=halves, bits=_BITS)
                plans.append(plan_of(even, terms, partial(spread_error, even, frame=frame), even.bias(n, frame)))
                continue
            depths = range(2, _MAX_DEPTH + 1) if self.depth is None else [check_depth(self.depth, _BITS)]
            trees = (CentredTree(dims=dims, depth=depth, power=power, bits=_BITS) for depth in depths)
            plans.append(
                deep_enough(
                    plan_of(tree, terms, partial(spread_error, tree, frame=frame), tree.bias(n, frame, None))
                    for tree in trees
                )
            )
        return min(plans, key=error_of)

    def _integers(self, plan: Plan, points: npt.ArrayLike) -> tuple[Arrays, Clamping]:
        records = as_points(points, int(self.dims), "points")
        check_size(len(records))
        cells, clamping = self._frame().cells(records, plan.design.bits)
        return plan.design.sums(cells), clamping

    def _queries(self, points: npt.ArrayLike) -> Floats:
        return as_points(points, int(self.dims), "points", finite=True)

    def _frame(self) -> Frame:
        return Frame.make(self.low, self.high, check_count(self.dims, "dims"))
