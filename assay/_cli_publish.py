"""`assay publish`: private counts of what each detector flagged, as documents come.

The publication goes to stdout as JSON or a table, messages to stderr. Exit codes: 0 published, 1 refused, 2 usage.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._cli_output import AsJson, refusals, say, wants_json, write_json

if TYPE_CHECKING:
    from assay.privacy.continual.plan import Plan
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
    delta: Annotated[
        float | None, typer.Option(help="Default 0: pure privacy, Laplace noise.", show_default=False)
    ] = None,
    adjacency: Annotated[str | None, typer.Option(help="add-remove (default) or replace.", show_default=False)] = None,
    unit: Annotated[str | None, typer.Option(help="document (default), author or event.", show_default=False)] = None,
    contributions: Annotated[
        int | None,
        typer.Option(min=1, help="Your promise: no unit has more documents. Default 1.", show_default=False),
    ] = None,
    separation: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Your promise: from one document of a unit to its next are at least so many steps, a step being a "
            "document of anybody. Default 1: none. Needs --delta; less noise.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost, and the error.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish detection rates that do not give away any one document."""
    with refusals():
        from assay.privacy.publish import RatePublisher, checked_detectors

        names = checked_detectors([name.strip() for name in detectors.split(",")])
        terms = Terms(horizon, epsilon, delta, adjacency, unit, contributions, separation)
        plan = None
        if not state.exists() or dry_run:
            plan = terms.plan(len(names))
            say(str(plan))
            say(promise(plan))
        if dry_run:
            return
        flags = read_flags(path, names)
        if plan is not None:
            publisher = _begin(plan, names, ledger, state, terms)
        else:
            publisher = RatePublisher.resume(state, names)
        try:
            terms.check(publisher.plan)
            rates = publisher.add(flags) if flags else publisher.latest()
        finally:
            publisher.close()
    if wants_json(as_json):
        write_json(rates.to_dict())
    else:
        _show(rates)


@dataclass(frozen=True)
class Terms:
    """The options about privacy as they were given; None where one was not."""

    horizon: int | None
    epsilon: float | None
    delta: float | None
    adjacency: str | None
    unit: str | None
    contributions: int | None
    separation: int | None

    def plan(self, columns: int) -> Plan:
        """The plan of a new series.

        Raises
        ------
        ValueError
            If an option is missing or out of range, or a promise buys nothing or cannot be kept.
        """
        from assay.privacy.continual import plan_counter

        if self.horizon is None or self.epsilon is None:
            raise ValueError("--horizon and --epsilon are needed to begin a series.")
        contributions, separation, delta = self.contributions or 1, self.separation or 1, self.delta or 0.0
        if separation > 1:
            if contributions == 1:
                raise ValueError(
                    "--separation needs --contributions of 2 or more: one document has no next one to be apart from."
                )
            if not delta:
                raise ValueError(
                    "--separation needs --delta above 0: it saves Gaussian noise, and none under pure privacy. "
                    "Give --delta 1e-6, or leave --separation out."
                )
            most = 1 + (self.horizon - 1) // separation
            if contributions > most:
                raise ValueError(
                    f"--contributions must be at most {most}: no more fit into {self.horizon} documents at least "
                    f"{separation} apart, got {contributions}."
                )
        rest: dict[str, Any] = {"adjacency": self.adjacency or "add-remove", "unit": self.unit or "document"}
        rest |= {"contributions": contributions, "separation": separation}
        return plan_counter(self.horizon, epsilon=self.epsilon, delta=delta, columns=columns, **rest)

    def check(self, plan: Plan) -> None:
        """Refuse options that are not those with which a running series began: they could change nothing."""
        has = {
            "horizon": plan.design.horizon,
            "adjacency": plan.cost.adjacency,
            "unit": plan.cost.unit,
            "contributions": plan.contributions,
            "separation": plan.separation,
        }
        for name, value in has.items():
            given = getattr(self, name)
            if given not in (None, value):
                raise ValueError(
                    f"--{name} was {value} when this series began, and stays so; got {given}. Leave it out."
                )
        if self.epsilon is not None or self.delta is not None:
            from assay.privacy.continual.plan import targets

            pure, zcdp = (None, None) if self.epsilon is None else targets(self.epsilon, self.delta or 0.0, None)
            if plan.cost.amount != (pure if plan.cost.kind == "pure" else zcdp):
                raise ValueError(
                    "--epsilon and --delta are not those with which this series began. Leave them out: it is paid for."
                )


def promise(plan: Plan) -> str:
    """What the guarantee rests on, and nothing in the software can check."""
    unit = plan.cost.unit
    most = plan.contributions
    if unit == "document":
        said = f"your promise: no document is counted more than {'once' if most == 1 else f'{most} times'}"
    else:
        said = f"your promise: no {unit} has more than {most} of the documents"
    if plan.separation > 1:
        said += f", and from one of them to the next of the same {unit} are at least {plan.separation} steps"
    return f"{said}. Where it is broken, the {unit} has less privacy than this says."


def read_flags(path: str, names: tuple[str, ...]) -> list[list[bool]]:
    """Rows of flags, one per document.

    Raises
    ------
    ValueError
        If a row is not an object with true or false for each name; the message names the line and not its content.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error.reason} at byte {error.start}.") from None
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


def _begin(plan: Plan, names: tuple[str, ...], ledger: Path, state: Path, terms: Terms) -> RatePublisher:
    from assay.privacy.budget import Budget
    from assay.privacy.ledger import Ledger
    from assay.privacy.publish import RatePublisher

    about: dict[str, Any] = {"adjacency": plan.cost.adjacency, "unit": plan.cost.unit}
    if ledger.exists():
        opened = Ledger.open(ledger)
    else:
        assert terms.epsilon is not None  # noqa: S101  # for the type checker
        if terms.delta:
            budget = Budget.approximate(terms.epsilon, terms.delta, **about)
        else:
            budget = Budget.pure(terms.epsilon, **about)
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
