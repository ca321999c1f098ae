"""Counters: noisy running sums of steps, released as the steps come.

Guarantee: that of the `Plan`, against steps chosen after seeing earlier releases. With a state file it holds across
crashes: a release is returned only after the state that contains its noise is on disk, so no noise is drawn twice.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Cost
from assay.privacy.continual import streams, toeplitz, trees
from assay.privacy.continual.plan import Plan
from assay.privacy.continual.statefile import Arrays, StateFile, Unbroken
from assay.privacy.ledger import Ledger
from assay.privacy.noise import Integers, NoiseSource, SeededDraws, noise_source

_KIND = "counter"
_DESIGNS: dict[str, Any] = {
    design.name: design
    for design in (
        trees.Plain,
        trees.BinaryTree,
        trees.Honaker,
        trees.KaryTree,
        trees.SmoothTree,
        toeplitz.SquareRoot,
        toeplitz.Banded,
        toeplitz.BufferedLinear,
    )
}


class Counter:
    """A running count, or `plan.columns` of them side by side.

    Parameters
    ----------
    plan
        From `plan_counter` or `plan_endless`.
    noise
        Where noise comes from; default `noise_source()`. Releases made with `SeededNoise` are `SeededDraws`.
    path
        A new state file; every release is on disk before it is returned. None keeps the state in memory.
    labels
        Names of the columns, kept in the state file; none, or one for each.

    Notes
    -----
    This does not enter the cost anywhere. `Counter.start` does, before any noise is drawn.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        noise: NoiseSource | None = None,
        path: str | os.PathLike[str] | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be a Plan, got {type(plan).__name__}. Make one with plan_counter().")
        if labels and len(labels) != plan.columns:
            raise ValueError(f"labels must be {plan.columns}, one for each column, got {len(labels)}.")
        self._plan = plan
        self._labels = tuple(labels)
        self._noise = noise_source() if noise is None else noise
        self._seeded = self._noise.seeded
        self._file = StateFile(path, new=True) if path is not None else None
        self._unbroken = Unbroken()
        self._time = 0
        self._totals = np.zeros(plan.columns, dtype=np.int64)
        self._value = np.zeros(plan.columns, dtype=np.int64)
        self._states = [streams.start(plan, self._noise) for _ in range(plan.columns)]
        self._save()

    @classmethod
    def start(
        cls,
        plan: Plan,
        ledger: Ledger,
        *,
        noise: NoiseSource | None = None,
        path: str | os.PathLike[str] | None = None,
        note: str = "",
        labels: Sequence[str] = (),
    ) -> Counter:
        """A counter whose whole cost is in the ledger before its first draw.

        Raises
        ------
        BudgetError
            If the ledger cannot pay.
        SeededNoiseError
            If `noise` is seeded.
        """
        source = noise_source() if noise is None else noise
        if path is not None:
            # Before the ledger pays for a counter that cannot be kept there.
            StateFile(path, new=True).close()
        ledger.spend(plan.cost, noise=source, note=note or str(plan)[:1000])
        return cls(plan, noise=source, path=path, labels=labels)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, noise: NoiseSource | None = None) -> Counter:
        """Go on from a state file; noise that was drawn is kept, and what it cost was paid at the start.

        Raises
        ------
        LedgerError
            If there is no such file, it is damaged, or another process holds it.
        """
        file = StateFile(path, new=False)
        try:
            settings, arrays = file.read(_KIND)
            return cls._restored(settings, arrays, noise, file)
        except BaseException:
            file.close()
            raise

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self._plan

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns, or none."""
        return self._labels

    @property
    def time(self) -> int:
        """Steps taken so far."""
        return self._time

    @property
    def value(self) -> Integers:
        """The latest release, int64, shape (columns,); zeros before the first."""
        self._unbroken.check()
        return self._marked(self._value.copy())

    @property
    def seeded(self) -> bool:
        """Whether any of the noise was seeded."""
        return self._seeded

    def step(self, value: int | npt.ArrayLike) -> Integers:
        """One step; returns the release, int64, shape (columns,)."""
        released: Integers = self.extend(np.asarray(value).reshape(1, -1))[0]
        return released

    def extend(self, values: npt.ArrayLike) -> Integers:
        """Several steps.

        Parameters
        ----------
        values
            Integers in 0 .. bound, shape (n,) for one column or (n, columns).

        Returns
        -------
        int64, shape (n, columns): the noisy sum after each step.

        Raises
        ------
        ValueError
            If a value is out of range, the shape is wrong, or the steps pass the horizon; no step is taken.
        LedgerError
            If the state file is closed, or an earlier call broke off.
        """
        steps = self._checked(values)
        out = np.empty(steps.shape, dtype=np.int64)
        if self._file is not None:
            self._file.check_open()
        with self._unbroken:
            for column, state in enumerate(self._states):
                line = np.ascontiguousarray(steps[:, column])
                out[:, column] = streams.advance(
                    self._plan, state, self._time, line, int(self._totals[column]), self._noise
                )
            if len(steps):
                self._time += len(steps)
                self._totals = self._totals + steps.sum(axis=0)
                self._value = out[-1].copy()
                self._save()
        return self._marked(out)

    def close(self) -> None:
        """Let other processes resume the state file."""
        if self._file is not None:
            self._file.close()

    def snapshot(self) -> tuple[dict[str, Any], Arrays]:
        """Settings and arrays of the whole state; as secret as the data."""
        settings = {
            "plan": plan_to(self._plan),
            "time": self._time,
            "seeded": self._seeded,
            "labels": list(self._labels),
        }
        arrays: Arrays = {"totals": self._totals, "value": self._value}
        for column, state in enumerate(self._states):
            arrays |= {f"{column}.{name}": held for name, held in state.items() if name != streams.POOL}
        return settings, arrays

    @classmethod
    def _restored(
        cls, settings: dict[str, Any], arrays: Arrays, noise: NoiseSource | None, file: StateFile | None = None
    ) -> Counter:
        counter = cls.__new__(cls)
        counter._plan = plan_from(settings["plan"])
        counter._noise = noise_source() if noise is None else noise
        counter._seeded = settings["seeded"] or counter._noise.seeded
        counter._file = file
        counter._unbroken = Unbroken()
        counter._time, counter._labels = settings["time"], tuple(settings["labels"])
        counter._totals, counter._value = arrays["totals"], arrays["value"]
        counter._states = [
            {name.split(".", 1)[1]: held for name, held in arrays.items() if name.startswith(f"{column}.")}
            for column in range(counter._plan.columns)
        ]
        return counter

    def _save(self) -> None:
        if self._file is not None:
            self._file.write(_KIND, *self.snapshot())

    def _checked(self, values: npt.ArrayLike) -> Integers:
        array = checked_steps(values, self._plan.columns, self._plan.bound)
        design = self._plan.design
        if self._time + len(array) > design.horizon and not getattr(design, "unbounded", False):
            raise ValueError(
                f"the plan ends at time {design.horizon}; {self._time} steps are taken and {len(array)} came. "
                "Plan a longer horizon, or none: plan_endless()."
            )
        return array

    def _marked(self, values: Integers) -> Integers:
        return values.view(SeededDraws) if self._seeded else values


def checked_steps(values: npt.ArrayLike, columns: int, bound: int) -> Integers:
    """Steps as int64 of shape (n, columns), each in 0 .. bound; a single column may come as shape (n,)."""
    array = np.asarray(values)
    if array.dtype.kind not in "bui":
        if array.size:
            raise TypeError(f"values must be integers, got {array.dtype}. Quantise first.")
        array = array.astype(np.int64)
    if array.ndim == 1 and columns == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"values must have shape (n, {columns}), got {array.shape}.")
    if array.size and (array.min() < 0 or array.max() > bound):
        raise ValueError(f"values must be in 0 .. {bound}, got {array.min()} to {array.max()}.")
    return array.astype(np.int64)


def plan_to(plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    cost = plan.cost
    return {
        "design": {"name": plan.design.name, **dataclasses.asdict(plan.design)},  # type: ignore[call-overload]
        "law": plan.law,
        "node": str(plan.node),
        "grid_bits": plan.grid_bits,
        "cost": {**dataclasses.asdict(cost), "amount": str(cost.amount)},
        "sizes": {name: getattr(plan, name) for name in ("bound", "contributions", "columns", "touched", "separation")},
    }


def plan_from(row: dict[str, Any]) -> Plan:
    """A plan from its JSON."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row["design"].items()
    }
    design = _DESIGNS[fields.pop("name")](**fields)
    return Plan(
        design=design,
        law=row["law"],
        node=Fraction(row["node"]),
        grid_bits=row["grid_bits"],
        cost=Cost(**{**row["cost"], "amount": Fraction(row["cost"]["amount"])}),
        **row["sizes"],
    )
