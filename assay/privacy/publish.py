"""Live detection rates: how many documents each detector flagged so far, published as the documents come.

Guarantee: that of the counter's plan, for one document (or author), against documents chosen after seeing earlier
figures. The number of documents is published as it is: under add/remove, a document that is left out still takes its
place in the stream. Intervals cover the privacy noise, at all times and detectors at once; how well the documents stand
for others is another question.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.privacy.continual.counter import Counter
from assay.privacy.continual.plan import Plan
from assay.privacy.ledger import Ledger
from assay.privacy.noise import NoiseSource, refuse_seeded

SCHEMA = "assay.rates/1"


@dataclass(frozen=True)
class Rates:
    """One publication.

    Attributes
    ----------
    detectors
        Their names.
    documents
        How many documents the counts are over.
    counts
        Noisy counts, one per detector; may be below 0 or above `documents`.
    standard_error
        Of a count, from privacy noise alone; exact.
    half_width
        Every count at every time of the whole plan is within this of the truth with probability 0.95.
    privacy
        What the whole series costs, in words.
    """

    detectors: tuple[str, ...]
    documents: int
    counts: tuple[int, ...]
    standard_error: float
    half_width: float
    privacy: str

    def rates(self) -> dict[str, tuple[float, float, float]]:
        """For each detector the rate and its interval, cut to [0, 1]; NaN before the first document."""
        if not self.documents:
            return dict.fromkeys(self.detectors, (float("nan"),) * 3)
        found = {}
        for name, count in zip(self.detectors, self.counts, strict=True):
            ends = (count, count - self.half_width, count + self.half_width)
            rate, low, high = (min(1.0, max(0.0, end / self.documents)) for end in ends)
            found[name] = (rate, low, high)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rows = {
            name: {"count": count, "rate": rate, "low": low, "high": high}
            for (name, (rate, low, high)), count in zip(self.rates().items(), self.counts, strict=True)
        }
        return {
            "schema": SCHEMA,
            "documents": self.documents,
            "detectors": rows if self.documents else {},
            "standard_error": self.standard_error,
            "confidence": 0.95,
            "privacy": self.privacy,
        }


class RatePublisher:
    """Publishes `Rates` as documents come. Made by `start` or `resume`.

    Parameters
    ----------
    counter
        With one column per detector.
    detectors
        Names, distinct.
    """

    def __init__(self, counter: Counter, detectors: Sequence[str]) -> None:
        names = checked_detectors(detectors)
        if len(names) != counter.plan.columns:
            raise ValueError(f"detectors must be {counter.plan.columns}, as the plan's columns, got {len(names)}.")
        if counter.labels and counter.labels != names:
            raise ValueError(f"detectors must be {list(counter.labels)}, as when the series began, got {list(names)}.")
        self._counter = counter
        self._detectors = names

    @classmethod
    def start(
        cls,
        plan: Plan,
        detectors: Sequence[str],
        ledger: Ledger,
        *,
        path: str | os.PathLike[str],
        noise: NoiseSource | None = None,
    ) -> RatePublisher:
        """Pay for the whole series, then begin it.

        Parameters
        ----------
        plan
            From `plan_counter(..., columns=len(detectors))`, `touched` left at all of them.
        detectors
            Names, distinct.
        ledger
            Pays; see `Ledger.spend`.
        path
            A new state file.
        noise
            Default `noise_source()`; a seeded one is refused.
        """
        names = checked_detectors(detectors)
        if len(names) != plan.columns or plan.touched != plan.columns:
            raise ValueError(
                f"plan must have columns={len(names)} and touched={len(names)}, got {plan.columns} and {plan.touched}: "
                "a document may be flagged by every detector."
            )
        note = f"rates of {', '.join(names)}"[:1000]
        return cls(Counter.start(plan, ledger, noise=noise, path=path, note=note, labels=names), names)

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], detectors: Sequence[str], *, noise: NoiseSource | None = None
    ) -> RatePublisher:
        """Go on from a state file, with the names in the same order."""
        counter = Counter.resume(path, noise=noise)
        try:
            return cls(counter, detectors)
        except BaseException:
            counter.close()
            raise

    @property
    def plan(self) -> Plan:
        """What was paid for."""
        return self._counter.plan

    def add(self, flags: npt.ArrayLike) -> Rates:
        """Count documents and publish.

        Parameters
        ----------
        flags
            Booleans or 0 and 1, shape (documents, detectors): who flagged which.

        Raises
        ------
        SeededNoiseError
            If any of the counter's noise was seeded.
        ValueError
            On other values or shapes, or past the plan's horizon.
        """
        refuse_seeded(self._counter)
        self._counter.extend(flags)
        return self.latest()

    def latest(self) -> Rates:
        """The last publication again; it costs nothing."""
        refuse_seeded(self._counter)
        plan, time = self._counter.plan, self._counter.time
        error = float(plan.standard_error(np.array([time]))[0]) if time else 0.0
        cost = plan.cost
        kind = "epsilon" if cost.kind == "pure" else "rho (zCDP)"
        privacy = f"{kind} {float(cost.amount):.6g} for {plan.about}"
        if plan.numerical_delta:
            privacy += f", up to total variation {plan.numerical_delta:.1g}"
        counts = tuple(self._counter.value.tolist())
        return Rates(self._detectors, time, counts, error, plan.band(0.05), privacy)

    def close(self) -> None:
        """Let other processes resume the state file."""
        self._counter.close()


def checked_detectors(detectors: Sequence[str]) -> tuple[str, ...]:
    """Names as a tuple; raises ValueError unless they are distinct, non-empty texts."""
    names = tuple(detectors)
    if isinstance(detectors, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"detectors must be a sequence of names, got {detectors!r}.")
    if len(set(names)) != len(names):
        raise ValueError(f"detectors must be distinct, got {list(names)}.")
    return names
