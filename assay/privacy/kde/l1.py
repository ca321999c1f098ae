"""L1KDE: sums of l1 distances from a private set to any point, by four constructions behind one interface.

Guarantee: epsilon-DP or rho-zCDP, as in `release`. One tree or histogram for each coordinate; errors of coordinates are
independent. Error of the default, with R = high - low for all coordinates: 6.70 R d^1.5 / epsilon, or
1.54 R d / sqrt(2 rho), whatever the number of records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_is_fitted

from assay.privacy.accounting import Adjacency, Unit
from assay.privacy.kde.blocks import Arrays, Block, Terms
from assay.privacy.kde.frame import Clamping, Floats, Frame, as_points
from assay.privacy.kde.histogram import Histogram
from assay.privacy.kde.release import Plan, Release, check_count, check_size, plan_of
from assay.privacy.kde.rings import RingTree
from assay.privacy.kde.trees import CentredTree, RefinedTree, check_depth
from assay.privacy.noise import Real

Construction = Literal["auto", "centred", "refined", "rings", "histogram"]

_BITS = 24
_MAX_DEPTH = 20
_BINS = range(1, 15)  # logarithms of the numbers of bins that the rule considers
_LATTICE = (np.arange(64) + 0.5) / 64


class L1KDE(Release):
    """Noisy sums f(y) = sum over records x of |x - y|_1, for any y.

    Parameters
    ----------
    low, high
        Public bounds of the records, one number or one per coordinate. They must not be read off the data: records
        outside are moved to them.
    dims
        Coordinates of a record.
    n
        Declared number of records, public: it sizes the release. The true number may differ; no guarantee rests on it.
    epsilon, delta, rho
        The budget: epsilon for pure DP, epsilon and delta for what is the better of pure DP and zCDP with that epsilon
        at that delta, or rho for zCDP.
    adjacency
        "add-remove" or "replace" of one record. Under "replace" the same budget buys half the epsilon.
    unit
        Whose data one record is. Where one author owns several, see `Cost.for_group`.
    construction
        "centred": geometric tree, the usual choice; "refined": tree of counts and sums as published; "rings": ring
        tree; "histogram"; "auto": the smaller error of "centred" and "histogram", from the settings above alone.
    law
        "laplace", "gaussian", or "auto" for the one with the smaller error among those that the budget allows.
    depth
        Levels of the tree; for the histogram the logarithm of the number of bins. None sizes it by n, dims and budget.
    alpha
        Width of rings, positive; only for "rings".
    density
        Public bound on the density of each coordinate as a multiple of uniform, or None to assume nothing. It only
        sizes the release and picks the construction; a wrong one costs accuracy, never privacy.

    Attributes
    ----------
    plan_
        The plan that was carried out.
    clamping_
        How many values were moved to the bounds: private, see `Clamping`. Not there after `load`.
    seeded
        Whether the noise was seeded.

    References
    ----------
    Liu et al. (2024), arXiv:2409.01688; Backurs et al. (2024), arXiv:2403.08917; docs/explanation/privacy-kde.md.

    Examples
    --------
    >>> from assay.privacy.kde import L1KDE
    >>> kde = L1KDE(low=0.0, high=1.0, n=1000, epsilon=1.0, adjacency="add-remove", unit="document")
    >>> kde = kde.fit([0.25] * 1000)
    >>> error = kde.standard_error([0.75])[0]
    >>> bool(abs(kde.query([0.75])[0] - 500.0) < 10 * error)
    True
    """

    _DESIGNS: ClassVar[dict[str, Any]] = {one.name: one for one in (CentredTree, RefinedTree, RingTree, Histogram)}

    def __init__(
        self,
        *,
        low: npt.ArrayLike,
        high: npt.ArrayLike,
        n: int,
        adjacency: Adjacency,
        unit: Unit,
        dims: int = 1,
        epsilon: Real | None = None,
        delta: float = 0.0,
        rho: Real | None = None,
        construction: Construction = "auto",
        law: Literal["auto", "laplace", "gaussian"] = "auto",
        depth: int | None = None,
        alpha: float = 0.1,
        density: float | None = None,
    ) -> None:
        self.low = low
        self.high = high
        self.n = n
        self.adjacency = adjacency
        self.unit = unit
        self.dims = dims
        self.epsilon = epsilon
        self.delta = delta
        self.rho = rho
        self.construction = construction
        self.law = law
        self.depth = depth
        self.alpha = alpha
        self.density = density

    def plan(self) -> Plan:
        """What `fit` would release and cost; the public rule.

        Of the allowed constructions, sizes and laws the one with the smallest root of noise^2 + approximation^2, where
        the noise is the exact standard error and the approximation the most that n records can suffer wherever they
        are. A tree is no deeper than it must be for the approximation not to exceed the noise; a histogram has the best
        number of bins.
        """
        n = check_count(self.n, "n")
        check_count(self.dims, "dims", most=100_000)
        frame = self._frame()
        if self.construction not in get_args(Construction):
            raise ValueError(f"construction must be one of {get_args(Construction)}, got {self.construction!r}.")
        if not (np.isfinite(self.alpha) and 0 < self.alpha <= 10):
            raise ValueError(f"alpha must be in (0, 10], got {self.alpha}.")
        if self.density is not None and not (np.isfinite(self.density) and self.density >= 1):
            raise ValueError(f"density must be at least 1, or None, got {self.density}.")
        terms = choose_law(self._terms(), self.law)
        kinds = ("centred", "histogram") if self.construction == "auto" else (self.construction,)
        plans = []
        for one in terms:
            for kind in kinds:
                designs = (self._make(kind, depth) for depth in self._depths(kind, n))
                found = (
                    plan_of(d, one, partial(spread_error, d, frame=frame), d.bias(n, frame, self.density))
                    for d in designs
                )
                plans.append(deep_enough(found) if kind == "centred" else min(found, key=error_of))
        return min(plans, key=error_of)

    def count(self) -> tuple[float, float]:
        """The number of records, and its standard error: from the noisy counts of the largest nodes, at no cost.

        Raises
        ------
        NotFittedError
            Before `fit` or `load`.
        """
        check_is_fitted(self, "plan_")
        first = self.plan_.blocks[0]
        counts = self.arrays_[first.name][:, first.start : first.stop]
        return float(counts.sum(axis=1).mean()), math.sqrt(counts.shape[1] * first.variance / counts.shape[0])

    def _make(self, kind: str, depth: int) -> Any:
        extra = {"alpha": float(self.alpha)} if kind == "rings" else {}
        return self._DESIGNS[kind](dims=int(self.dims), depth=depth, bits=_BITS, **extra)

    def _depths(self, kind: str, n: int) -> Iterable[int]:
        if self.depth is not None:
            return [check_depth(self.depth, _BITS)]
        if kind == "histogram":
            return _BINS
        if kind == "centred":
            return range(6, _MAX_DEPTH + 1)
        # As published: a leaf for each record, by the declared number.
        return [min(_MAX_DEPTH, max(1, (n - 1).bit_length()))]

    def _integers(self, plan: Plan, points: npt.ArrayLike) -> tuple[Arrays, Clamping]:
        records = as_points(points, int(self.dims), "points")
        check_size(len(records))
        cells, clamping = self._frame().cells(records, plan.design.bits)
        return plan.design.sums(cells), clamping

    def _queries(self, points: npt.ArrayLike) -> Floats:
        return as_points(points, int(self.dims), "points", finite=True)

    def _frame(self) -> Frame:
        return Frame.make(self.low, self.high, check_count(self.dims, "dims"))


def choose_law(terms: tuple[Terms, ...], law: str) -> tuple[Terms, ...]:
    """The terms whose law was asked for; all of them for "auto"."""
    if law not in ("auto", "laplace", "gaussian"):
        raise ValueError(f"law must be 'auto', 'laplace' or 'gaussian', got {law!r}.")
    kept = tuple(one for one in terms if law in ("auto", one.law))
    if not kept:
        got = terms[0].law
        raise ValueError(f"law {law!r} does not fit this budget, which allows {got!r}. Give epsilon and delta.")
    return kept


def spread_error(design: Any, blocks: tuple[Block, ...], frame: Frame) -> float:
    """Standard error of the noise, root mean square over queries spread evenly between the bounds."""
    queries = frame.low + _LATTICE[:, None] * frame.width
    return float(np.sqrt(design.variance(blocks, frame, queries).mean()))


def deep_enough(plans: Iterable[Plan]) -> Plan:
    """Of trees of growing depth the first whose approximation does not exceed its noise, or the best of all."""
    best: Plan | None = None
    for plan in plans:
        if best is None or plan.error < best.error:
            best = plan
        if plan.approximation <= plan.noise_error:
            break
    if best is None:
        raise ValueError("plans must not be empty.")
    return best


def error_of(plan: Plan) -> float:
    """What the public rule makes small."""
    return plan.error
