"""`assay monitor`: watch the detector scores of one source; an alarm when they leave their intervals too often.

Results go to stdout, as JSON when it is not a terminal or with --json; messages go to stderr. With --state a call takes
in new scores only and goes on from the one before.
Exit codes: 0 no alarm, 1 refused or failed, 2 usage, 4 alarm.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._cli_output import AsJson, refusals, say, wants_json, write_json

if TYPE_CHECKING:
    from assay.conformal.monitor import MonitorResult

ALARM = 4


def monitor(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Scores in order of time: a number a line, or .csv, .jsonl, .parquet with --column; - for stdin.",
        ),
    ],
    *,
    reference: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="The first N scores are from a time when all was in order; needed to begin.",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the watch here; later calls bring new scores only. Made on first use."),
    ] = None,
    first: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="NUMBER",
            help="With --state: which watched score PATH begins with, from 1. Refused unless it is the next.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Column or field with the scores, such as statistic.")
    ] = "score",
    alpha: Annotated[float, typer.Option(help="Miscoverage level of the intervals.")] = 0.1,
    false_alarm: Annotated[
        float, typer.Option(help="Bound on the probability that an alarm is ever raised without cause.")
    ] = 0.01,
    max_miss_rate: Annotated[
        float | None, typer.Option(help="Miss rate still in order; default 1.5 alpha.", show_default=False)
    ] = None,
    direction: Annotated[str, typer.Option(help="Which misses count: both, above, below.")] = "both",
    lags: Annotated[int, typer.Option(min=1, help="Last scores from which the next is forecast.")] = 5,
    window: Annotated[int, typer.Option(min=1, help="Residuals that the intervals rest on.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every draw: the same seed gives the same result.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture of the intervals, SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a source's detector scores; raise an alarm with a bounded chance of a false one."""
    with refusals():
        scores = list(_read(path, column))
        settings: dict[str, Any] = {
            "alpha": alpha,
            "false_alarm": false_alarm,
            "max_miss_rate": max_miss_rate,
            "direction": direction,
            "lags": lags,
            "window": window,
        }
        if state is None:
            if reference is None:
                raise ValueError("--reference is needed: how many of the first scores are in order.")
            if first is not None:
                raise ValueError("--first goes with --state: without it every call begins anew.")
            from assay.conformal.monitor import monitor_scores

            result = monitor_scores(scores, reference=reference, **settings, random_state=seed)
            watched = f"{reference} reference scores, {len(result.scores)} watched"
            more: dict[str, Any] = {}
        else:
            given = {name for name in (*settings, "reference", "seed") if _was_given(context, name)}
            result, total, before = _go_on(state, scores, reference, seed, settings, given, first)
            watched = f"{len(result.scores)} scores, {total} watched so far"
            if before:
                watched += "; the alarm was raised before them"
            more = {"n_watched": total, "alarmed_before": before}
        if plot is not None:
            import numpy as np

            from assay.conformal.plots import intervals_over_time

            ends = np.column_stack([result.lower, result.upper])
            picture = intervals_over_time(
                result.scores, result.point, ends, alarm=result.alarm, title=f"Scores: {path}"
            )
            plot.write_text(picture, encoding="utf-8")
            say(f"picture: {plot}")
    if wants_json(as_json):
        write_json(result.to_dict() | more)
    else:
        typer.echo(result.sentence())
        typer.echo(f"{watched}; e-value {_e(result.log_evalue[-1])}.")
    raise typer.Exit(0 if result.alarm is None else ALARM)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _go_on(
    path: Path,
    scores: list[float],
    reference: int | None,
    seed: int,
    settings: dict[str, Any],
    given: set[str],
    first: int | None,
) -> tuple[MonitorResult, int, bool]:
    """The result for these scores, how many were watched so far, and whether the alarm stood before them."""
    from assay._errors import StateError
    from assay.conformal.checkpoint import Checkpoint
    from assay.conformal.monitor import ScoreMonitor

    if path.exists():
        with Checkpoint.resume(path) as kept:
            watch = kept.process
            if not isinstance(watch, ScoreMonitor):
                raise StateError(f"{path} keeps a {type(watch).__name__}, not the watch of this command.")
            began = watch.get_params() | {"reference": len(watch.reference)}
            for name in sorted(given - {"seed"}):
                now = reference if name == "reference" else settings[name]
                if now != began[name]:
                    option = "--" + name.replace("_", "-")
                    raise ValueError(
                        f"{option} was {began[name]} when this watch began, and stays so; got {now}. Leave it out."
                    )
            if "seed" in given:
                raise ValueError("--seed is for the call that begins a watch. Leave it out.")
            before = watch.alarmed
            result: MonitorResult = kept.update(scores, number=first)
            return result, kept.n_steps, before
    if reference is None:
        raise ValueError(f"--reference is needed to begin a watch: there is nothing at {path} yet.")
    if len(scores) <= reference:
        raise ValueError(
            f"the first call needs the reference and at least one score more, got {len(scores)} scores and --reference "
            f"{reference}."
        )
    if first not in (None, 1):
        raise ValueError(f"--first must be 1 where a watch begins, got {first}.")
    fresh = ScoreMonitor(**settings, random_state=seed).fit(scores[:reference])
    # Before the file is made, so that a call that breaks off has begun nothing.
    result = fresh.update(scores[reference:])
    with Checkpoint.start(path, fresh, n_steps=len(result.scores)) as kept:
        return result, kept.n_steps, False


def _e(log_evalue: float) -> str:
    from assay.detection.result import format_evalue

    return format_evalue(float(log_evalue))


def _read(path: str, column: str) -> Iterator[float]:
    if path == "-":
        yield from _numbers(sys.stdin, "-")
        return
    file = Path(path)
    kind = file.suffix.lower()
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            values = pq.read_table(file, columns=[column]).column(column).to_pylist()
        except (pa.ArrowException, KeyError) as error:
            raise ValueError(f"{path} cannot be read as Parquet with a column {column!r}: {error}") from None
        yield from (_number(value, row) for row, value in enumerate(values, 1))
        return
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if kind == ".csv":
            yield from _csv(lines, path, column)
        elif kind in (".jsonl", ".ndjson"):
            for row, line in enumerate(_text(lines, path), 1):
                if line.strip():
                    yield _number(_field(_object(line, row), column, row), row)
        else:
            yield from _numbers(lines, path)


def _numbers(lines: Iterable[str], path: str) -> Iterator[float]:
    yield from (_number(line, row) for row, line in enumerate(_text(lines, path), 1) if line.strip())


def _csv(lines: Iterable[str], path: str, column: str) -> Iterator[float]:
    try:
        for row, record in enumerate(csv.DictReader(_text(lines, path)), 1):
            yield _number(_field(record, column, row), row)
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}.") from None


def _text(lines: Iterable[str], path: str) -> Iterator[str]:
    """The lines; bytes that are no UTF-8 are refused with the file's name."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}. Save it as UTF-8.") from None


def _object(line: str, row: int) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nesting without end
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"row {row} is not a JSON object.")
    return record


def _field(record: dict[str, object], column: str, row: int) -> object:
    if column not in record:
        raise ValueError(f"row {row} has no {column!r}; name the field with --column.")
    return record[column]


def _number(value: Any, row: int) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"row {row} is not a number: {value!r:.80}.") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"row {row} is {number}; every score must be finite.")
    return number
