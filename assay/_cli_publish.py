"""`assay publish`: private counts of what each detector flagged, as documents come.

The publication goes to stdout as JSON or a table, messages to stderr. Exit codes: 0 published, 1 refused, 2 usage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._cli_output import AsJson, refusals, say, wants_json, write_json

if TYPE_CHECKING:
    from assay.privacy.publish import RatePublisher, Rates


def publish(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="JSON lines, or - for stdin: one object of true/false per document.")
    ],
    *,
    ledger: Annotated[Path, typer.Option(metavar="FILE", help="The privacy budget; made on first use.")],
    state: Annotated[Path, typer.Option(metavar="FILE", help="The running counts; secret. Made on first use.")],
    detectors: Annotated[str, typer.Option(metavar="A,B,...", help="Fields to count, in a fixed order.")],
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Most documents ever; needed on first use.", show_default=False)
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Cost of the whole series; needed on first use.", show_default=False)
    ] = None,
    delta: Annotated[float, typer.Option(help="0 for pure privacy.")] = 0.0,
    adjacency: Annotated[str, typer.Option(help="add-remove or replace.")] = "add-remove",
    unit: Annotated[str, typer.Option(help="document, author or event.")] = "document",
    contributions: Annotated[int, typer.Option(min=1, help="Most documents of one unit; to be enforced by you.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost, and the error.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish detection rates that do not give away any one document."""
    with refusals():
        from assay.privacy.publish import RatePublisher, checked_detectors

        names = checked_detectors([name.strip() for name in detectors.split(",")])
        plan = None
        if not state.exists() or dry_run:
            if horizon is None or epsilon is None:
                raise ValueError("--horizon and --epsilon are needed to begin a series.")
            from assay.privacy.continual import plan_counter

            terms: dict[str, Any] = {"adjacency": adjacency, "unit": unit}
            plan = plan_counter(
                horizon, epsilon=epsilon, delta=delta, columns=len(names), contributions=contributions, **terms
            )
            say(str(plan))
        if dry_run:
            return
        flags = read_flags(path, names)
        if plan is not None:
            publisher = _begin(plan, names, ledger, state, epsilon, delta)
        else:
            publisher = RatePublisher.resume(state, names)
        try:
            rates = publisher.add(flags) if flags else publisher.latest()
        finally:
            publisher.close()
    if wants_json(as_json):
        write_json(rates.to_dict())
    else:
        _show(rates)


def read_flags(path: str, names: tuple[str, ...]) -> list[list[bool]]:
    """Rows of flags, one per document.

    Raises
    ------
    ValueError
        If a row is not an object with true or false for each name; the message names the line and not its content.
    """
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}, line {number}: not JSON.") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), bool) for name in names):
            raise ValueError(f"{path}, line {number}: needs true or false for each of {', '.join(names)}.")
        rows.append([row[name] for name in names])
    return rows


def _begin(
    plan: Any, names: tuple[str, ...], ledger: Path, state: Path, epsilon: float | None, delta: float
) -> RatePublisher:
    from assay.privacy.budget import Budget
    from assay.privacy.ledger import Ledger
    from assay.privacy.publish import RatePublisher

    terms: dict[str, Any] = {"adjacency": plan.cost.adjacency, "unit": plan.cost.unit}
    if ledger.exists():
        opened = Ledger.open(ledger)
    else:
        assert epsilon is not None  # noqa: S101  # for the type checker
        budget = Budget.approximate(epsilon, delta, **terms) if delta else Budget.pure(epsilon, **terms)
        opened = Ledger.create(ledger, budget)
        say(f"new budget: {opened!r}")
    with opened:
        made = RatePublisher.start(plan, names, opened, path=state)
        say(f"paid: {opened!r}; head {opened.head}")
    return made


def _show(rates: Rates) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rates.documents:,} documents; {rates.privacy}", title_justify="left")
    for heading in ("detector", "flagged", "rate", "95 % interval, all times and detectors"):
        table.add_column(heading, justify="left" if heading == "detector" else "right")
    for (name, (rate, low, high)), count in zip(rates.rates().items(), rates.counts, strict=True):
        table.add_row(name, f"{count:,}", f"{rate:.4f}", f"{low:.4f} to {high:.4f}")
    Console().print(table)
