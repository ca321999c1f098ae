"""`assay calibrate` and `assay detect --null human`: a zero-shot score calibrated on human texts, and its p-values.

Results go to stdout, progress and messages to stderr. Exit codes as those of `assay detect`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._cli_output import AsJson, refusals, say, wants_json, warnings_on_stderr, write_json

if TYPE_CHECKING:
    from assay.conformal.calibration import Calibration
    from assay.detection.corpus.reading import Document
    from assay.detection.result import TestResult
    from assay.kernels.scoring.model import ModelScorer

_REJECTS_SHOWN = 10

GroupColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Field that names a text's group (domain, language): each is calibrated apart."),
]


def calibrate(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="HUMAN texts: files, folders, patterns, as for `detect`.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Write the calibration here.")],
    model: Annotated[
        str, typer.Option(metavar="PATH", help='The scoring model: folder, hub id or "default".')
    ] = "default",
    other_model: Annotated[
        str | None, typer.Option(metavar="PATH", help="The second model, for --score binoculars.")
    ] = None,
    score: Annotated[
        str, typer.Option(help="curvature, log_perplexity, entropy_gap, rank, log_rank, lrr or binoculars.")
    ] = "curvature",
    text_column: Annotated[str, typer.Option(metavar="NAME", help="Field that holds the text.")] = "text",
    group_column: GroupColumn = None,
    length_edges: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Calibrate length bins apart, which begin at these numbers of tokens."),
    ] = "",
    guarantee: Annotated[
        str, typer.Option(help="marginal, simes or monte-carlo: on average, or for this very calibration set.")
    ] = "marginal",
    confidence: Annotated[float, typer.Option(help="Of simes and monte-carlo.")] = 0.9,
    level: Annotated[
        float, typer.Option(help="The smallest level that will be used; small groups are refused.")
    ] = 0.05,
    min_tokens: Annotated[int, typer.Option(min=1, help="Leave out shorter texts.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Calibrate a score on human texts, so that its p-values have a known rate of false positives."""
    with refusals():
        from assay.conformal.human import calibrate as fit

        edges = _edges(length_edges)
        documents, rejects = _documents(paths, text_column, group_column)
        groups = None if group_column is None else [_group(document) for document in documents]
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work, which takes minutes
        scorer, other = _scorer(model), None if other_model is None else _scorer(other_model)
        with warnings_on_stderr():
            made = fit(
                [document.text for document in documents],
                scorer,
                score=score,
                other=other,
                groups=groups,
                length_edges=edges,
                guarantee=guarantee,  # type: ignore[arg-type]  # checked by what is called
                confidence=confidence,
                level=level,
                min_tokens=min_tokens,
                progress=True,
            )
        made.save(out)
    short = len(documents) - len(made.scores)
    if short:
        say(f"warning: {short} of {len(documents)} texts have fewer than {min_tokens} tokens and were left out")
    say(f"wrote {out}")
    if wants_json(as_json):
        write_json(_summary(made, left_out=short, rejects=rejects))
    else:
        _show_summary(made)
    if rejects:
        raise typer.Exit(3)


def _show_summary(made: Calibration) -> None:
    typer.echo(f"Calibration {made.id}: {len(made.scores)} human texts, score {made.score}.")
    found = made.p_values
    for name, count, floor in zip(found.groups_, found.counts_, found.floors_, strict=True):
        typer.echo(f"  {name}: {count} texts; effective for levels down to {floor:.2g}")


def detect_human(
    paths: Sequence[str],
    calibration: Path,
    *,
    model: str | None,
    other_model: str | None,
    text_column: str,
    id_column: str | None,
    group_column: str | None,
    fdr: float,
    as_json: bool,
) -> int:
    """Test texts against "a human wrote it": one result per line, with q-values by Benjamini-Hochberg.

    Returns the exit code.
    """
    from assay.conformal.calibration import Calibration
    from assay.conformal.human import human_tests

    if not 0.0 < fdr < 1.0:
        raise ValueError(f"fdr must be in (0, 1), got {fdr}.")
    known = Calibration.load(calibration)
    documents, rejects = _documents(paths, text_column, group_column, id_column)
    code = 3 if rejects else 0
    groups = [_group(document) for document in documents] if known.grouped else None
    scorer = _scorer(model or known.scorer.name)
    second = other_model or (None if known.other is None else known.other.name)
    results = human_tests(
        [document.text for document in documents],
        known,
        scorer,
        other=None if second is None else _scorer(second),
        groups=groups,
        progress=len(documents) > 1,
    )
    untested = sum(result.n_scored == 0 for result in results)
    if untested:
        say(
            f"warning: {untested} of {len(results)} texts were not tested (p = 1): fewer than {known.min_tokens} "
            "tokens, or a length that was not calibrated"
        )
    rows = list(_rows(documents, results, fdr))
    if len(results) == 1 and not wants_json(as_json):
        typer.echo(results[0].sentence())
        typer.echo(repr(results[0]))
        return code
    if wants_json(as_json):
        for row in rows:
            typer.echo(json.dumps(row))
        return code
    flagged = sum(row["flagged"] for row in rows)
    typer.echo(f"{len(rows) - untested:,} texts tested, {flagged:,} flagged at a false discovery rate of {fdr:.3g}.")
    return code


def _rows(documents: Sequence[Document], results: Sequence[TestResult], fdr: float) -> Iterator[dict[str, Any]]:
    from assay.detection.multiplicity import benjamini_hochberg

    log_q = benjamini_hochberg([result.log_pvalue for result in results])
    for document, result, q in zip(documents, results, log_q.tolist(), strict=True):
        found = {"doc_id": document.doc_id, "pvalue": result.pvalue, "qvalue": math.exp(q)}
        yield found | {"flagged": q <= math.log(fdr)} | result.to_dict()


def _documents(
    paths: Sequence[str], text_column: str, group_column: str | None, id_column: str | None = None
) -> tuple[list[Document], int]:
    """Documents in order, and how many rows could not be read: the first of them are named on stderr."""
    from assay._errors import RunError
    from assay.detection.corpus.reading import Columns, Document, read
    from assay.detection.corpus.sources import find_inputs
    from assay.detection.text import decode_text

    if list(paths) == ["-"]:
        text = decode_text(sys.stdin.buffer.read()).removeprefix("\ufeff")
        return [Document(0, 1, 0, "-", "-", None, text)], 0
    inputs = find_inputs(paths)
    if not inputs:
        raise RunError(f"paths: nothing to read at {', '.join(paths)}. Name text, JSON-lines or Parquet files.")
    columns = Columns(text=text_column, id=id_column, source=group_column)
    found, rejects = [], 0
    for row in read(inputs, columns):
        if isinstance(row, Document):
            found.append(row)
            continue
        rejects += 1
        if rejects <= _REJECTS_SHOWN:
            place = row.name if row.line is None else f"{row.name}, line {row.line}"
            say(f"warning: {place}: {': '.join(filter(None, (row.reason, row.detail)))}")
    if rejects > _REJECTS_SHOWN:
        say(f"warning: {rejects - _REJECTS_SHOWN} more rows could not be read")
    if not found and rejects:
        raise RunError(f"paths: none of {rejects} rows could be read. Name the field of the text with --text-column.")
    return found, rejects


def _group(document: Document) -> str:
    if document.source is None:
        raise ValueError(f"the group column must name a group for every text, {document.doc_id!r} has none.")
    return document.source


def _scorer(model: str) -> ModelScorer:
    from assay.kernels.scoring.model import ModelScorer
    from assay.models import load_model, load_tokenizer_for_generation

    return ModelScorer(load_model(model), load_tokenizer_for_generation(model))


def _edges(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.split(",") if piece.strip()]
    except ValueError:
        raise ValueError(f"--length-edges must be numbers of tokens such as 50,100,200, got {text!r}.") from None


def _summary(made: Calibration, *, left_out: int, rejects: int) -> dict[str, Any]:
    counts = dict(zip(made.p_values.groups_.tolist(), made.p_values.counts_.tolist(), strict=True))
    floors = dict(zip(made.p_values.groups_.tolist(), made.p_values.floors_.tolist(), strict=True))
    kept: dict[str, Any] = {"id": made.id, "score": made.score, "texts": len(made.scores), "groups": counts}
    kept |= {"left_out": left_out, "rejects": rejects, "smallest_pvalues": floors}
    return kept | {"guarantee": made.p_values.guarantee, "texts_sha256": made.texts_sha256}
