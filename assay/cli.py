"""The `assay` command. Numerics, torch and plots are loaded by the command that needs them, so that --help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from assay import __version__
from assay._cli_demo import demo
from assay._cli_detect import detect
from assay._cli_human import calibrate
from assay._cli_keys import keys_app
from assay._cli_monitor import monitor
from assay._cli_plan import plan
from assay._cli_publish import publish
from assay._cli_report import report, verify
from assay._cli_serve import api_keys_app, serve

app = typer.Typer(
    help="Tests where text came from, and says how sure it is.",
    no_args_is_help=True,
    # A traceback with local variables could show a secret.
    pretty_exceptions_show_locals=False,
)
app.command()(demo)
app.command()(detect)
app.command()(calibrate)
app.command()(plan)
app.command()(monitor)
app.command()(publish)
app.command()(report)
app.command()(verify)
app.command()(serve)
app.add_typer(keys_app, name="keys")
app.add_typer(api_keys_app, name="api-keys")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point of the `assay` command."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise SystemExit(130) from None
