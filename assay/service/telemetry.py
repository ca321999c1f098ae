"""Detection rates by day, published with differential privacy only, from a budget that a ledger keeps.

Guarantee: all that is ever published about a tenant's jobs is epsilon-differentially private in total, epsilon the
budget's, for adding or removing one document (one row of one job). A day's figures are the number of documents and, for
each key, how many have their smallest p-value under it, at most the level. One document moves the first by 1 and one of
the others by 1, whatever the other documents are, so the l1 sensitivity is 2; flags at a false discovery rate would
depend on all documents of a job and are not used. Noise: discrete Laplace of scale 2 / epsilon (Ghosh, Roughgarden,
Sundararajan 2012, arXiv:0811.2841), drawn after the ledger has the cost on disk.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import orjson
from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from assay.detection.corpus.ledger import write_atomically
from assay.privacy.accounting import Cost
from assay.privacy.budget import Budget
from assay.privacy.ledger import Ledger
from assay.privacy.noise import NoiseSource, laplace_scale, noise_source
from assay.service import jobs
from assay.service.database import Job

SENSITIVITY: Final = 2
CONFIDENCE: Final = 0.95
_WAIT: Final = 10.0


class ConflictError(Exception):
    """It exists already, with other settings, or cannot be done yet."""


@dataclass(frozen=True)
class Standing:
    """What may be spent and what was, in epsilon."""

    epsilon: float
    spent: float
    remaining: float


class Telemetry:
    """A tenant's published figures.

    Parameters
    ----------
    sessions, data
        Of the database, and the service's folder.
    tenant
        Whose.
    noise
        Default `noise_source()`; a seeded one is refused by the ledger.
    """

    def __init__(
        self, sessions: sessionmaker[Any], data: Path, tenant: str, *, noise: NoiseSource | None = None
    ) -> None:
        self._sessions = sessions
        self._data = data
        self._tenant = tenant
        self._noise = noise
        self._folder = data / "telemetry" / tenant
        self._ledger = self._folder / "budget.ledger"

    def grant(self, epsilon: float) -> Standing:
        """Set the budget; once, since a second one would void what the first has promised.

        Raises
        ------
        ConflictError
            If there is one.
        """
        if self._ledger.exists():
            raise ConflictError("the budget is set, and cannot be changed: the promise made with it would be void.")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with Ledger.create(self._ledger, Budget.pure(_exact(epsilon), **_TERMS)) as ledger:
            return _standing(ledger)

    def standing(self) -> Standing | None:
        """The budget; None where none was set."""
        if not self._ledger.exists():
            return None
        with Ledger.open(self._ledger, wait=_WAIT) as ledger:
            return _standing(ledger)

    def days(self) -> list[dict[str, Any]]:
        """What was published, oldest day first."""
        return [orjson.loads(path.read_bytes()) for path in sorted(self._folder.glob("day-*.json"))]

    def publish(self, day: date, key_ids: list[str], *, epsilon: float, level: float) -> dict[str, Any]:
        """The figures of a day that is over. Asked again they are the same, and cost nothing.

        Parameters
        ----------
        day
            UTC; a job belongs to the day on which it finished.
        key_ids
            All keys of the tenant, whether or not a document was flagged under them.
        epsilon
            What the day costs.
        level
            A document counts for its key if its p-value is at most this.

        Raises
        ------
        ConflictError
            If the day is not over, was published with other settings, or no budget was set.
        BudgetError
            If the budget does not suffice; nothing is spent.
        """
        if day >= datetime.now(UTC).date():
            raise ConflictError("day must be over (UTC): figures of a day are published once.")
        if not self._ledger.exists():
            raise ConflictError("there is no budget: set one with PUT /v1/telemetry/budget.")
        path = self._folder / f"day-{day.isoformat()}.json"
        with Ledger.open(self._ledger, wait=_WAIT) as ledger:  # its lock keeps two requests apart
            if path.exists():
                known: dict[str, Any] = orjson.loads(path.read_bytes())
                if (known["epsilon"], known["level"]) != (epsilon, level):
                    raise ConflictError("the day was published with another epsilon or level; see GET /v1/telemetry.")
                return known
            noise = self._noise or noise_source()
            ledger.spend(Cost.pure(_exact(epsilon), **_TERMS), noise=noise, note=f"detection rates of {day}")
            scale = laplace_scale(SENSITIVITY / _exact(epsilon))
            documents, flagged = self._counts(day, level)
            truth = [documents, *(flagged[id] for id in key_ids)]
            noisy = [count + int(error) for count, error in zip(truth, noise.laplace(scale, len(truth)), strict=True)]
            found = figures(day, key_ids, noisy, scale=scale, epsilon=epsilon, level=level)
            write_atomically(path, orjson.dumps(found))
        return found

    def _counts(self, day: date, level: float) -> tuple[int, Counter[str]]:
        """Documents tested on a day, and how many of them have a p-value of at most the level under each key."""
        documents, flagged = 0, Counter[str]()
        for path in self._results(day):
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["key_id", "log_pvalue"]):
                    documents += batch.num_rows
                    rows = zip(batch["key_id"].to_pylist(), batch["log_pvalue"].to_pylist(), strict=True)
                    flagged.update(key for key, log_pvalue in rows if log_pvalue <= math.log(level))
        return documents, flagged

    def _results(self, day: date) -> Iterator[Path]:
        begin = datetime.combine(day, time(), UTC)
        mine = (Job.tenant_id == self._tenant) & (Job.state == jobs.FINISHED)
        during = (Job.updated >= begin) & (Job.updated < begin + timedelta(days=1))
        with self._sessions() as session:
            ids = session.scalars(select(Job.id).where(mine & during).order_by(Job.id)).all()
        folders = jobs.JobFolders(self._data)
        return (folders.run(id) / "results.parquet" for id in ids)


_TERMS: Final[dict[str, Any]] = {"adjacency": "add-remove", "unit": "document"}


def figures(
    day: date, key_ids: list[str], noisy: list[int], *, scale: Fraction, epsilon: float, level: float
) -> dict[str, Any]:
    """Noisy counts as they are published: with rates, and intervals that hold all at once with probability 0.95."""
    half = half_width(scale, len(noisy))
    documents, *counts = noisy
    detectors = {}
    for id, count in zip(key_ids, counts, strict=True):
        most, least = documents + half, documents - half
        low = max(0.0, (count - half) / most) if most > 0 else 0.0
        high = min(1.0, max(0.0, (count + half) / least)) if least > 0 else 1.0
        rate = min(high, max(low, count / documents)) if documents > 0 else None
        detectors[id] = {"flagged": count, "rate": rate, "low": min(low, high), "high": high}
    return {
        "day": day.isoformat(),
        "epsilon": epsilon,
        "level": level,
        "documents": documents,
        "detectors": detectors,
        "half_width": half,
        "confidence": CONFIDENCE,
    }


def half_width(scale: Fraction, draws: int) -> int:
    """The smallest t such that all of so many discrete Laplace draws are within t with probability 0.95 (union bound).

    P(|Y| > t) = 2 q**(t + 1) / (1 + q), q = exp(-1 / scale).
    """
    log_q = -1.0 / float(scale)
    share = (1.0 - CONFIDENCE) / draws
    t = math.log(share * (1.0 + math.exp(log_q)) / 2.0) / log_q - 1.0
    return max(0, math.ceil(t))


def _exact(value: float) -> Fraction:
    """The decimal that was written: ten times 0.1 is 1."""
    return Fraction(repr(value))


def _standing(ledger: Ledger) -> Standing:
    return Standing(float(ledger.budget.limit), float(ledger.spent), float(ledger.remaining))
