"""MaxSum and SumSelect: the largest of d running sums, and which one it is, released as rows of 0 and 1 come.

Guarantee: epsilon-DP or rho-zCDP for one row, against rows chosen after seeing earlier releases (rho by trees: up to
the `numerical_delta` of `plan.counter`). Two ways: `tree`, d
counters at once, whose l1 sensitivity is d; `recompute`, fresh noise every r steps at times fixed in advance, held in
between, with sensitivity 1. Recompute pays about (T / rho)^(1/3), the tree sqrt(d) times logs: trees win for long
streams, recompute for many columns. Reference: Jain, Raskhodnikova, Sivakumar, Smith (2021), arXiv:2112.00828.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Adjacency, Cost, Unit, exact
from assay.privacy.continual.counter import Counter, checked_steps, plan_from, plan_to
from assay.privacy.continual.plan import Plan, plan_counter
from assay.privacy.continual.statefile import StateFile, Unbroken
from assay.privacy.continual.trees import check_horizon
from assay.privacy.ledger import Ledger
from assay.privacy.noise import Integers, NoiseSource, Real, SeededDraws, gaussian_variance, laplace_scale, noise_source

Question = Literal["max", "select"]
Way = Literal["tree", "recompute"]
_KIND = "selection"


@dataclass(frozen=True, kw_only=True)
class SelectionPlan:
    """What a `Selection` will do. Made by `plan_selection`.

    Attributes
    ----------
    question
        "max": the largest running sum; "select": the column that has it.
    way
        "tree" or "recompute".
    horizon, columns
        T and d.
    cost
        Of the whole release.
    period
        Steps between recomputations; 0 for trees.
    node
        Scale or variance of the noise of one recomputation; for "select" the scale of the geometric noise. 1 for trees.
    counter
        The plan of the d counters; None for "recompute".
    expected_error
        Expected largest error over the stream, for the worst stream; a formula that simulation meets within 15 %.
    """

    question: Question
    way: Way
    horizon: int
    columns: int
    cost: Cost
    period: int
    node: Fraction
    counter: Plan | None
    expected_error: float

    def __str__(self) -> str:
        how = f"recompute every {self.period} steps" if self.way == "recompute" else f"{self.columns} counters"
        return (
            f"{'MaxSum' if self.question == 'max' else 'SumSelect'} by {how}, {self.cost.kind} "
            f"{float(self.cost.amount):.4g} for {self.cost.adjacency} of one {self.cost.unit}; "
            f"expected largest error over {self.horizon} steps {self.expected_error:.4g}"
        )


def plan_selection(
    question: Question,
    horizon: int,
    columns: int,
    *,
    epsilon: Real | None = None,
    rho: Real | None = None,
    adjacency: Adjacency,
    unit: Unit,
    way: Way | None = None,
) -> SelectionPlan:
    """Choose between trees and recomputing by the expected largest error.

    Parameters
    ----------
    question
        "max" or "select".
    horizon, columns
        T and d; public.
    epsilon, rho
        Exactly one.
    adjacency, unit
        What one row is. Under replace, "select" by recomputing needs twice the noise: some sums rise, others fall.
    way
        "tree" or "recompute" to decide for it.
    """
    if question not in ("max", "select"):
        raise ValueError(f"question must be 'max' or 'select', got {question!r}.")
    if way not in (None, "tree", "recompute"):
        raise ValueError(f"way must be 'tree', 'recompute' or None, got {way!r}.")
    check_horizon(horizon)
    if type(columns) is not int or columns < 1:
        raise ValueError(f"columns must be a positive integer, got {columns!r}.")
    which, amount = ("epsilon", epsilon) if rho is None else ("rho", rho)
    if amount is None or (epsilon is not None and rho is not None):
        raise ValueError("give either epsilon or rho.")
    given: dict[str, Any] = {which: exact(amount, which)}
    terms: dict[str, Any] = {"adjacency": adjacency, "unit": unit}
    plans = []
    if way != "recompute":
        counter = plan_counter(horizon, columns=columns, **given, **terms)
        error = tree_error(counter)
        plans.append(
            SelectionPlan(
                question=question, way="tree", horizon=horizon, columns=columns, cost=counter.cost, period=0,
                node=Fraction(1), counter=counter, expected_error=error,
            )
        )  # fmt: skip
    if way != "tree":
        plans.append(_recompute(question, horizon, columns, which, given[which], terms))
    return min(plans, key=lambda plan: plan.expected_error)


def tree_error(counter: Plan) -> float:
    """Expected largest |error| over time of the largest of d noisy sums.

    The largest standard error times sqrt(2 ln(d sqrt(T))): d independent lines, each with about sqrt(T) effectively
    independent values at its level. The exponent is a fit; simulation agrees within 15 % for Gaussian noise, T = 2^8 ..
    2^16 and d = 4 .. 256.
    """
    worst = counter.mean_and_max_variance[1]
    effective = max(2.0, counter.columns * math.sqrt(counter.design.horizon))
    return math.sqrt(worst * 2 * math.log(effective))


def recompute_error(question: Question, horizon: int, columns: int, period: int, spread: float, law: str) -> float:
    """Expected largest error over time when recomputing every `period` steps, on a stream that grows at every step.

    A held value is off by up to period - 1 steps, half of it removed by centring; to that comes the largest of m noise
    draws. For "select" the sum of the chosen column falls behind by the largest gap of noise and by the staleness.
    """
    releases = max(1, horizon // period)
    if question == "select":
        # The largest of d geometric draws of scale s, and of m such gaps.
        return (period - 1) + spread * math.log(max(2.0, columns * releases))
    if law == "laplace":
        return (period - 1) / 2 + spread * (math.log(releases) + 0.5772)
    # Mean of the largest of m absolute normal draws, by its median-like quantile.
    from scipy.special import ndtri

    largest = -float(ndtri((1 - 0.5 ** (1 / releases)) / 2)) * 1.02
    return (period - 1) / 2 + spread * largest


def _recompute(
    question: Question, horizon: int, columns: int, which: str, amount: Fraction, terms: dict[str, Any]
) -> SelectionPlan:
    best: SelectionPlan | None = None
    make = Cost.pure if which == "epsilon" else Cost.zcdp
    for period in sorted({max(1, round(horizon ** (i / 200))) for i in range(201)}):
        releases = max(1, horizon // period)
        law = "laplace"
        if question == "select":
            # Noisy max with one-sided geometric noise: sums move together under add/remove, apart under replace.
            each = amount / releases if which == "epsilon" else Fraction(math.sqrt(2 * amount / releases) * (1 - 1e-12))
            node = laplace_scale((2 if terms["adjacency"] == "replace" else 1) / each)
            spread = float(node)
        elif which == "epsilon":
            node = laplace_scale(releases / amount)
            spread = float(node)
        else:
            law = "gaussian"
            node = gaussian_variance(releases / (2 * amount))
            spread = math.sqrt(node)
        error = recompute_error(question, horizon, columns, period, spread, law)
        if best is None or error < best.expected_error:
            best = SelectionPlan(
                question=question, way="recompute", horizon=horizon, columns=columns, cost=make(amount, **terms),
                period=period, node=node, counter=None, expected_error=error,
            )  # fmt: skip
    assert best is not None  # noqa: S101  # for the type checker
    return best


def crossover(columns: int, **privacy: Any) -> int:
    """The smallest power of two from which on trees have the smaller expected error for MaxSum; at most 2**40.

    Parameters
    ----------
    columns
        d.
    privacy
        epsilon or rho, adjacency and unit, as for `plan_selection`.
    """
    for power in range(1, 41):
        horizon = 1 << power
        tree = plan_selection("max", horizon, columns, way="tree", **privacy).expected_error
        if tree < plan_selection("max", horizon, columns, way="recompute", **privacy).expected_error:
            return horizon
    return 1 << 40


class Selection:
    """The largest of `plan.columns` running sums, or its column, released at every step.

    Guarantee: all releases together cost `plan.cost` for one row, against rows chosen after seeing earlier releases.

    Parameters
    ----------
    plan
        From `plan_selection`.
    ledger
        Pays before any noise is drawn; None enters the cost nowhere.
    noise, path
        As for `Counter`.
    """

    def __init__(
        self,
        plan: SelectionPlan,
        *,
        ledger: Ledger | None = None,
        noise: NoiseSource | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(plan, SelectionPlan):
            raise TypeError(f"plan must be a SelectionPlan, got {type(plan).__name__}. Make one with plan_selection().")
        self._plan = plan
        self._noise = noise_source() if noise is None else noise
        self._seeded = self._noise.seeded
        # Before the ledger pays: a place that is taken, or cannot be written, must cost nothing.
        self._file = StateFile(path, new=True) if path is not None else None
        if ledger is not None:
            ledger.spend(plan.cost, noise=self._noise, note=str(plan)[:1000])
        self._time = 0
        self._totals: Integers = np.zeros(plan.columns, dtype=np.int64)
        # Until the first recomputation the sum is known to lie in 0 .. period - 1.
        self._held = (plan.period - 1) // 2 if plan.question == "max" and plan.period else 0
        self._counter = Counter(plan.counter, noise=self._noise) if plan.counter is not None else None
        self._unbroken = Unbroken()
        self._save()

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, noise: NoiseSource | None = None) -> Selection:
        """Go on from a state file; see `Counter.resume`."""
        file = StateFile(path, new=False)
        try:
            held, arrays = file.read(_KIND)
            selection = cls(_selection_plan_from(held["plan"]), noise=noise)
            selection._seeded = held["seeded"] or selection._seeded
            selection._time, selection._held = held["time"], held["held"]
            selection._totals = arrays.pop("selection_totals")
            if held["inner"] is not None:
                selection._counter = Counter._restored(held["inner"], arrays, selection._noise)
            selection._file = file
        except BaseException:
            file.close()
            raise
        return selection

    @property
    def plan(self) -> SelectionPlan:
        """The plan."""
        return self._plan

    @property
    def time(self) -> int:
        """Steps taken so far."""
        return self._time

    @property
    def seeded(self) -> bool:
        """Whether any of the noise was seeded."""
        return self._seeded

    def extend(self, rows: npt.ArrayLike) -> Integers:
        """Several rows of 0 and 1, shape (n, columns). Returns sums or column numbers, int64, shape (n,)."""
        steps = checked_steps(rows, self._plan.columns, 1)
        if self._time + len(steps) > self._plan.horizon:
            raise ValueError(
                f"the plan ends at time {self._plan.horizon}; {self._time} steps are taken and {len(steps)} came."
            )
        if self._file is not None:
            self._file.check_open()
        with self._unbroken:
            if self._counter is not None:
                noisy = np.asarray(self._counter.extend(steps))
                out = noisy.max(axis=1) if self._plan.question == "max" else noisy.argmax(axis=1)
                self._totals = self._totals + steps.sum(axis=0)
            else:
                out = self._recomputed(steps)
            self._time += len(steps)
            if len(steps):
                self._save()
        released: Integers = out.astype(np.int64)
        return released.view(SeededDraws) if self._seeded else released

    def close(self) -> None:
        """Let other processes resume the state file."""
        if self._file is not None:
            self._file.close()

    def _recomputed(self, steps: Integers) -> Integers:
        out = np.empty(len(steps), dtype=np.int64)
        done, period = 0, self._plan.period
        while done < len(steps):
            part = steps[done : done + period - (self._time + done) % period]
            out[done : done + len(part)] = self._held
            self._totals = self._totals + part.sum(axis=0)
            done += len(part)
            if (self._time + done) % period == 0:
                self._held = self._fresh()
                out[done - 1] = self._held
        return out

    def _fresh(self) -> int:
        if self._plan.question == "select":
            return int(np.argmax(self._totals + geometric(self._noise, self._plan.node, self._plan.columns)))
        draws = self._noise.laplace if self._plan.cost.kind == "pure" else self._noise.gaussian
        return int(self._totals.max()) + int(draws(self._plan.node, 1)[0]) + (self._plan.period - 1) // 2

    def _save(self) -> None:
        if self._file is None:
            return
        inner, arrays = self._counter.snapshot() if self._counter is not None else (None, {})
        held = {
            "plan": _selection_plan_to(self._plan),
            "seeded": self._seeded,
            "time": self._time,
            "held": self._held,
            "inner": inner,
        }
        self._file.write(_KIND, held, {**arrays, "selection_totals": self._totals})


def geometric(noise: NoiseSource, scale: Fraction, size: int) -> Integers:
    """Draws with P(g >= k) = exp(-k / scale) for k >= 0: a discrete Laplace draw, given that it is not negative."""
    found = np.full(size, -1, dtype=np.int64)
    while (found < 0).any():
        missing = np.flatnonzero(found < 0)
        found[missing] = np.asarray(noise.laplace(scale, len(missing)))
    return found


def _selection_plan_to(plan: SelectionPlan) -> dict[str, Any]:
    names = ("question", "way", "horizon", "columns", "period", "expected_error")
    return {
        **{name: getattr(plan, name) for name in names},
        "node": str(plan.node),
        "cost": {
            "kind": plan.cost.kind, "amount": str(plan.cost.amount), "adjacency": plan.cost.adjacency,
            "unit": plan.cost.unit,
        },
        "counter": plan_to(plan.counter) if plan.counter is not None else None,
    }  # fmt: skip


def _selection_plan_from(row: dict[str, Any]) -> SelectionPlan:
    cost = Cost(**{**row["cost"], "amount": Fraction(row["cost"]["amount"])})
    counter = plan_from(row["counter"]) if row["counter"] is not None else None
    return SelectionPlan(**{**row, "cost": cost, "counter": counter, "node": Fraction(row["node"])})
