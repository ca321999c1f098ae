"""What the commands write and how they refuse: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from assay._errors import AssayError

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, also to a terminal.")]


_MODELS = ("torch", "transformers", "safetensors")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn Assay's errors into one line on stderr and an exit code."""
    try:
        yield
    except (AssayError, OSError) as error:
        say(f"error: {_words(error)}")
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        if error.name not in _MODELS:
            raise
        say(f"error: this needs torch and transformers, and there is no {error.name}: pip install 'assay[models]'.")
        raise typer.Exit(1) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _words(error: Exception) -> str:
    """An error in words; those of the system without their numbers."""
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Write the warnings of a block as lines on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        say(f"warning: {warning.message}")


def say(message: str) -> None:
    """A message for people, on stderr."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message)


def wants_json(as_json: bool) -> bool:
    """Whether results are to be JSON: asked for, or stdout is not a terminal."""
    return as_json or not sys.stdout.isatty()


def as_json_text(content: object) -> str:
    """Indented JSON that ends in a line end."""
    return json.dumps(content, indent=2) + "\n"


def write_json(content: object) -> None:
    """JSON on stdout."""
    sys.stdout.write(as_json_text(content))
