"""`assay demo`: the tour on the terminal."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("assay-demo"),
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a causal model; default the bundled.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampler and the edits.", min=0)] = 0,
) -> None:
    """The tour: generate, tamper, detect and report, offline, in less than two minutes."""
    from rich.console import Console
    from rich.table import Table

    from assay._cli_output import refusals
    from assay.detection.result import format_pvalue

    errors = Console(stderr=True)
    with refusals():
        from assay import demo as tour

        result = tour.run(out, model=model, seed=seed, say=lambda line: errors.print(f"[dim]{line} ...[/dim]"))
    table = Table(title="Does the text carry the mark of the tour's key?", title_justify="left")
    table.add_column("text")
    table.add_column("what it is")
    for name in ("tokens", "counted", "p, ids alone", "p, with model"):
        table.add_column(name, justify="right")
    table.add_column("at FDR 1 %")
    for finding in result.findings:
        table.add_row(
            finding.exhibit.doc_id,
            finding.exhibit.source,
            str(finding.plain.n_tokens),
            str(finding.plain.n_scored),
            format_pvalue(finding.plain.log_pvalue),
            format_pvalue(finding.with_model.log_pvalue),
            "[green]marked[/green]" if finding.flagged else "no evidence",
        )
    console = Console()
    # A pipe has no width of its own; the table needs this much to keep each row on one line.
    console.width = max(console.width, 118) if not console.is_terminal else console.width
    console.print(table)
    strongest = min(result.findings, key=lambda finding: finding.with_model.log_pvalue)
    console.print(f"[bold]{strongest.exhibit.doc_id}:[/bold] {strongest.with_model.sentence()}")
    console.print(f"Report: {result.page}  (signed; check it with: {_command()} verify {result.page.parent})")
    console.print(f"{result.seconds:.0f} seconds.")


def _command() -> str:
    """How this command was called, where a shell would not find it by its name."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "assay" and shutil.which("assay") is None else "assay"
