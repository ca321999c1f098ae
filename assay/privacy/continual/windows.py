"""Sliding windows: how many events the last W steps held, for ever, at the price of one counter of horizon W.

Guarantee: that of the plan, however long the stream. Time is cut into blocks of W steps, each with a counter of its
own; a window is the end of one block and the beginning of the next. A step lies in one block, so blocks do not add up;
a unit's `contributions` may lie in several, which costs no more than all of them in one.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.privacy.continual.counter import Counter, checked_steps, plan_from, plan_to
from assay.privacy.continual.plan import Plan
from assay.privacy.continual.statefile import StateFile, Unbroken
from assay.privacy.continual.trees import Floats
from assay.privacy.ledger import Ledger
from assay.privacy.noise import Integers, NoiseSource, SeededDraws, noise_source

_KIND = "window"


class SlidingWindow:
    """Counts over the last `plan.design.horizon` steps, for each of `plan.columns`.

    Guarantee: all windows together cost `plan.cost`, however long the stream.

    Parameters
    ----------
    plan
        From `plan_counter(W, ...)`. A histogram over a window is `columns` cells with `touched` 1 (add/remove) or 2
        (replace).
    ledger
        Pays before any noise is drawn; None enters the cost nowhere.
    noise, path
        As for `Counter`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        ledger: Ledger | None = None,
        noise: NoiseSource | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be a Plan, got {type(plan).__name__}. Make one with plan_counter().")
        self._plan = plan
        self._noise = noise_source() if noise is None else noise
        self._seeded = self._noise.seeded
        # Before the ledger pays: a place that is taken, or cannot be written, must cost nothing.
        self._file = StateFile(path, new=True) if path is not None else None
        if ledger is not None:
            ledger.spend(plan.cost, noise=self._noise, note=f"sliding window: {plan}"[:1000])
        shape = (plan.design.horizon, plan.columns)
        # Before the first block there was nothing, which is known without noise.
        self._before: Integers = np.zeros(shape, dtype=np.int64)
        self._now: Integers = np.zeros(shape, dtype=np.int64)
        self._blocks = 0
        self._inner = Counter(plan, noise=self._noise)
        self._unbroken = Unbroken()
        self._save()

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, noise: NoiseSource | None = None) -> SlidingWindow:
        """Go on from a state file; see `Counter.resume`."""
        file = StateFile(path, new=False)
        try:
            held, arrays = file.read(_KIND)
            window = cls(plan_from(held["plan"]), noise=noise)
            window._seeded = held["seeded"] or window._seeded
            window._blocks = held["blocks"]
            window._before, window._now = arrays.pop("before"), arrays.pop("now")
            window._inner = Counter._restored(held["inner"], arrays, window._noise)
            window._file = file
        except BaseException:
            file.close()
            raise
        return window

    @property
    def time(self) -> int:
        """Steps taken so far."""
        return self._blocks * self._plan.design.horizon + self._inner.time

    @property
    def seeded(self) -> bool:
        """Whether any of the noise was seeded."""
        return self._seeded

    def error_bound(self, times: npt.ArrayLike) -> Floats:
        """An upper bound on the standard deviation of the releases at `times`, from 1.

        The two releases of the older block are correlated: their standard deviations are added, not their variances.
        """
        length = self._plan.design.horizon
        at = np.asarray(times, dtype=np.int64)
        place = (at - 1) % length + 1
        own = self._plan.standard_error(place)
        whole = self._plan.standard_error(np.array(length))
        older = np.where((at <= length) | (place == length), 0.0, whole + own)
        found: Floats = np.sqrt(own**2 + older**2)
        return found

    def extend(self, values: npt.ArrayLike) -> Integers:
        """Several steps, as `Counter.extend`; returns the noisy window counts, int64, shape (n, columns)."""
        steps = checked_steps(values, self._plan.columns, self._plan.bound)
        out = np.empty(steps.shape, dtype=np.int64)
        length = self._plan.design.horizon
        done = 0
        if self._file is not None:
            self._file.check_open()
        with self._unbroken:
            while done < len(steps):
                place = self._inner.time
                part = steps[done : done + length - place]
                end = place + len(part)
                self._now[place:end] = self._inner.extend(part)
                out[done : done + len(part)] = self._now[place:end] + self._before[-1] - self._before[place:end]
                done += len(part)
                if end == length:
                    self._before, self._now = self._now, np.zeros_like(self._now)
                    self._blocks += 1
                    self._inner = Counter(self._plan, noise=self._noise)
            if len(steps):
                self._save()
        return out.view(SeededDraws) if self._seeded else out

    def close(self) -> None:
        """Let other processes resume the state file."""
        if self._file is not None:
            self._file.close()

    def _save(self) -> None:
        if self._file is None:
            return
        inner, arrays = self._inner.snapshot()
        held: dict[str, Any] = {
            "plan": plan_to(self._plan),
            "seeded": self._seeded,
            "blocks": self._blocks,
            "inner": inner,
        }
        self._file.write(_KIND, held, {**arrays, "before": self._before, "now": self._now})
