"""Watched sources of a report: what `assay.conformal` said of them over time, as records of bounded length.

Scores of `ScoreMonitor` become a series with its alarm; sets of states, of `SentenceLabeller` and its like, the sizes
that they have step by step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from assay.report import wording
from assay.report.excerpts import clean
from assay.report.records import MOST_STATES, MOST_STEPS, LabelledSource, MonitoredSource

if TYPE_CHECKING:
    from assay.conformal.markov import StateSets
    from assay.conformal.monitor import MonitorResult

MOST_SOURCES = 30


@dataclass(frozen=True)
class Watched:
    """Sources with watched scores, and sources with labelled steps."""

    scores: tuple[MonitoredSource, ...]
    labels: tuple[LabelledSource, ...]


def watched(monitoring: Iterable[Any]) -> Watched:
    """The records of tuples (source, MonitorResult) or (source, sets of states), in their order.

    Raises
    ------
    ValueError
        If something else is among them, a source comes twice, there are more than 30, or the sets of a source differ
        in their level or their states.
    """
    items = list(monitoring)
    if not items:
        return Watched((), ())
    from assay.conformal.monitor import MonitorResult

    scores: list[MonitoredSource] = []
    labels: list[LabelledSource] = []
    for item in items:
        if not (isinstance(item, tuple) and len(item) == 2):
            raise ValueError(f"monitoring must hold tuples (source, MonitorResult), got {type(item).__name__}.")
        source, held = str(item[0]), item[1]
        if isinstance(held, MonitorResult):
            scores.append(_record(source, held))
        else:
            labels.append(_labelled(source, _sets(held)))
    names = [one.source for one in scores] + [one.source for one in labels]
    if len(names) > MOST_SOURCES or len(set(names)) < len(names):
        raise ValueError(
            f"monitoring must hold at most {MOST_SOURCES} sources, each once, got {len(names)} with "
            f"{len(set(names))} names. Choose the sources that the report is about."
        )
    return Watched(tuple(scores), tuple(labels))


def _sets(held: Any) -> list[StateSets]:
    from assay.conformal.markov import StateSets
    from assay.conformal.mixed_documents import SentenceLabels

    items = list(held) if isinstance(held, (list, tuple)) else []
    found = [one.sets if isinstance(one, SentenceLabels) else one for one in items]
    if not found or not all(isinstance(one, StateSets) for one in found):
        raise ValueError(
            "monitoring must hold tuples (source, MonitorResult) or (source, list of SentenceLabels or StateSets), got "
            f"{type(held).__name__} as the second."
        )
    return found


def _labelled(source: str, sets: list[StateSets]) -> LabelledSource:
    first = sets[0]
    if any((one.alpha, one.labels) != (first.alpha, first.labels) for one in sets):
        raise ValueError(f"the sets of source {source!r} must have one alpha and the same states in the same order.")
    if len(first.labels) > MOST_STATES:
        raise ValueError(f"a report shows at most {MOST_STATES} states, source {source!r} has {len(first.labels)}.")
    sizes = [0] * (len(first.labels) + 1)
    for one in sets:
        for step in range(one.candidates.shape[1]):
            sizes[len(one.states_at(step))] += 1
    return LabelledSource(
        source=clean(source),
        words=wording.labelled(sizes, len(sets), first.alpha),
        alpha=float(first.alpha),
        states=tuple(clean(str(label)) for label in first.labels),
        n_sets=len(sets),
        sizes=tuple(sizes),
    )


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
