"""Counters without a horizon, with delta 0 too: epochs that double in length, and a noisy total of each.

Guarantee: half of the privacy goes to a counter within the epoch of times 2^i .. 2^(i+1) - 1, half to the noisy total
of the epoch once it is over. A step lies in one epoch, so the epochs do not add up: epsilon or rho in all, however long
it runs; rho up to a total variation of `numerical_delta`. The error at time t is that of a counter of horizon t / 2 at
half the privacy, and of log2(t) totals.
Reference: Chan, Shi, Song (2011), the hybrid mechanism.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Adjacency, Cost, Unit, exact
from assay.privacy.continual.counter import Counter, checked_steps
from assay.privacy.continual.plan import Plan, plan_counter
from assay.privacy.continual.statefile import StateFile, Unbroken
from assay.privacy.ledger import Ledger
from assay.privacy.noise import Integers, NoiseSource, Real, SeededDraws, noise_source

_KIND = "endless"
_NUMERICAL = 1e-7  # epochs whose rounding could cost more take an exact tree


class EndlessCounter:
    """A running count that never ends, under pure or zero-concentrated privacy.

    For Gaussian noise `Counter` with `plan_endless` has less error; this one also gives epsilon-DP with delta 0.

    Parameters
    ----------
    epsilon, rho
        Exactly one: the cost of the whole endless release.
    adjacency, unit, bound, contributions
        As for `plan_counter`.
    ledger
        Pays before any noise is drawn; None enters the cost nowhere.
    noise, path
        As for `Counter`.
    """

    def __init__(
        self,
        *,
        epsilon: Real | None = None,
        rho: Real | None = None,
        adjacency: Adjacency,
        unit: Unit,
        bound: int = 1,
        contributions: int = 1,
        ledger: Ledger | None = None,
        noise: NoiseSource | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        which, amount = ("epsilon", epsilon) if rho is None else ("rho", rho)
        if amount is None or (epsilon is not None and rho is not None):
            raise ValueError("give either epsilon or rho.")
        self._which = which
        self._amount = exact(amount, which)
        self._terms: dict[str, Any] = {"adjacency": adjacency, "unit": unit}
        self._sizes: dict[str, Any] = {"bound": bound, "contributions": contributions}
        self._plans: dict[tuple[int, str | None], Plan] = {}
        self._noise = noise_source() if noise is None else noise
        self._seeded = self._noise.seeded
        self._total_plan = self._plan(1, "plain")
        # Before the ledger pays: a place that is taken, or cannot be written, must cost nothing.
        self._file = StateFile(path, new=True) if path is not None else None
        if ledger is not None:
            ledger.spend(self.cost, noise=self._noise, note="endless counter")
        self._epoch = 0
        self._closed = 0  # noisy sum over the epochs that are over
        self._exact = 0  # exact sum within this epoch
        self._value = 0
        self._inner = Counter(self._plan(1), noise=self._noise)
        self._unbroken = Unbroken()
        self._save()

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, noise: NoiseSource | None = None) -> EndlessCounter:
        """Go on from a state file; see `Counter.resume`."""
        file = StateFile(path, new=False)
        try:
            held, arrays = file.read(_KIND)
            amount: dict[str, Any] = {held["which"]: Fraction(held["amount"])}
            counter = cls(**amount, **held["terms"], **held["sizes"], noise=noise)
            counter._seeded = held["seeded"] or counter._seeded
            counter._epoch, counter._closed, counter._exact, counter._value = held["numbers"]
            counter._inner = Counter._restored(held["inner"], arrays, counter._noise)
            counter._file = file
        except BaseException:
            file.close()
            raise
        return counter

    @property
    def cost(self) -> Cost:
        """What the endless release costs."""
        make = Cost.pure if self._which == "epsilon" else Cost.zcdp
        return make(self._amount, **self._terms)

    @property
    def time(self) -> int:
        """Steps taken so far."""
        return int(2**self._epoch) - 1 + self._inner.time

    @property
    def value(self) -> int:
        """The latest release; 0 before the first."""
        self._unbroken.check()
        return self._value

    @property
    def seeded(self) -> bool:
        """Whether any of the noise was seeded."""
        return self._seeded

    @property
    def numerical_delta(self) -> float:
        """How far rounding may take the releases so far from those of exact arithmetic, in total variation.

        The largest over epochs, as many times as a unit has contributions, which may lie in as many epochs; 0 under
        epsilon.
        """
        plans = [self._plan(2**epoch).numerical_delta for epoch in range(self._epoch + 1)]
        return min(int(self._sizes["contributions"]), len(plans)) * max(plans)

    def standard_error(self, time: int) -> float:
        """Exact standard deviation of the release at a time, from 1."""
        if type(time) is not int or time < 1:
            raise ValueError(f"time must be a positive integer, got {time!r}.")
        epoch = time.bit_length() - 1
        inner = float(self._plan(2**epoch).standard_error(time - 2**epoch + 1))
        return math.sqrt(inner**2 + epoch * self._total_plan.node_variance)

    def extend(self, values: npt.ArrayLike) -> Integers:
        """Several steps: integers in 0 .. bound, shape (n,). Returns the noisy sums, int64, shape (n,)."""
        steps = checked_steps(values, 1, self._sizes["bound"])[:, 0]
        out = np.empty(len(steps), dtype=np.int64)
        done = 0
        if self._file is not None:
            self._file.check_open()
        with self._unbroken:
            while done < len(steps):
                room = 2**self._epoch - self._inner.time
                part = steps[done : done + room]
                out[done : done + len(part)] = self._closed + self._inner.extend(part)[:, 0]
                self._exact += int(part.sum())
                done += len(part)
                if len(part) == room:
                    self._next_epoch()
            if len(steps):
                self._value = int(out[-1])
                self._save()
        return out.view(SeededDraws) if self._seeded else out

    def close(self) -> None:
        """Let other processes resume the state file."""
        if self._file is not None:
            self._file.close()

    def _next_epoch(self) -> None:
        plan = self._total_plan
        draw = self._noise.laplace(plan.node, 1) if plan.law == "laplace" else self._noise.gaussian(plan.node, 1)
        self._closed += self._exact + int(draw[0])
        self._epoch, self._exact = self._epoch + 1, 0
        self._inner = Counter(self._plan(2**self._epoch), noise=self._noise)

    def _plan(self, horizon: int, mechanism: str | None = None) -> Plan:
        found = self._plans.get((horizon, mechanism))
        if found is None:
            half: dict[str, Any] = {self._which: self._amount / 2}
            found = plan_counter(horizon, mechanism=mechanism, **half, **self._terms, **self._sizes)
            if found.numerical_delta > _NUMERICAL:
                found = plan_counter(horizon, mechanism="smooth tree", **half, **self._terms, **self._sizes)
            self._plans[horizon, mechanism] = found
        return found

    def _save(self) -> None:
        if self._file is None:
            return
        inner, arrays = self._inner.snapshot()
        held = {
            "which": self._which,
            "amount": str(self._amount),
            "terms": self._terms,
            "sizes": self._sizes,
            "seeded": self._seeded,
            "numbers": [self._epoch, self._closed, self._exact, self._value],
            "inner": inner,
        }
        self._file.write(_KIND, held, arrays)
