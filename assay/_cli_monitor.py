"""`assay monitor`: watch the detector scores of one source; an alarm when they leave their intervals too often.

Results go to stdout, as JSON when it is not a terminal or with --json; messages go to stderr.
Exit codes: 0 no alarm, 1 refused or failed, 2 usage, 4 alarm.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from assay._cli_output import AsJson, refusals, say, wants_json, write_json

ALARM = 4


def monitor(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Scores in order of time: a number a line, or .csv, .jsonl, .parquet with --column; - for stdin.",
        ),
    ],
    *,
    reference: Annotated[
        int, typer.Option(min=1, metavar="N", help="The first N scores are from a time when all was in order.")
    ],
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
        from assay.conformal.monitor import monitor_scores

        result = monitor_scores(
            scores,
            reference=reference,
            alpha=alpha,
            false_alarm=false_alarm,
            max_miss_rate=max_miss_rate,
            direction=direction,  # type: ignore[arg-type]  # checked there, with a message of its own
            lags=lags,
            window=window,
            random_state=seed,
        )
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
        write_json(result.to_dict())
    else:
        typer.echo(result.sentence())
        typer.echo(f"{reference} reference scores, {len(result.scores)} watched; e-value {_e(result.log_evalue[-1])}.")
    raise typer.Exit(0 if result.alarm is None else ALARM)


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


def _number(value: object, row: int) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"row {row} is not a number: {value!r:.80}.") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"row {row} is {number}; every score must be finite.")
    return number
