"""Monitored sources of a report: results of `assay.conformal.ScoreMonitor` as records of bounded length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from assay.report import wording
from assay.report.excerpts import clean
from assay.report.records import MOST_STEPS, MonitoredSource

if TYPE_CHECKING:
    from assay.conformal.monitor import MonitorResult

MOST_SOURCES = 30


def monitored(monitoring: Iterable[Any]) -> tuple[MonitoredSource, ...]:
    """The records of tuples (source, MonitorResult), in their order.

    Raises
    ------
    ValueError
        If something else is among them, a source comes twice, or there are more than 30.
    """
    items = list(monitoring)
    if not items:
        return ()
    from assay.conformal.monitor import MonitorResult

    records = []
    for item in items:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], MonitorResult)):
            raise ValueError(f"monitoring must hold tuples (source, MonitorResult), got {type(item).__name__}.")
        records.append(_record(str(item[0]), item[1]))
    names = [one.source for one in records]
    if len(records) > MOST_SOURCES or len(set(names)) < len(names):
        raise ValueError(
            f"monitoring must hold at most {MOST_SOURCES} sources, each once, got {len(names)} with "
            f"{len(set(names))} names. Choose the sources that the report is about."
        )
    return tuple(records)


def _record(source: str, result: MonitorResult) -> MonitoredSource:
    n, alarm = len(result.scores), result.alarm
    # The part around the alarm, with as much before it as after; without one the last scores.
    first = max(0, min(n - MOST_STEPS, n if alarm is None else alarm - MOST_STEPS // 2))
    shown = slice(first, first + MOST_STEPS)
    missed = int(result.missed.sum())
    return MonitoredSource(
        source=clean(source),
        words=wording.monitored(n, missed, alarm, result.max_miss_rate, result.false_alarm),
        alpha=float(result.alpha),
        max_miss_rate=float(result.max_miss_rate),
        false_alarm=float(result.false_alarm),
        n_scores=n,
        n_missed=missed,
        alarm=alarm,
        log_evalue_largest=float(result.log_evalue.max()),
        first=first,
        scores=tuple(result.scores[shown].tolist()),
        point=tuple(result.point[shown].tolist()),
        lower=tuple(result.lower[shown].tolist()),
        upper=tuple(result.upper[shown].tolist()),
        missed=tuple(result.missed[shown].tolist()),
        log_evalue=tuple(result.log_evalue[shown].tolist()),
    )
