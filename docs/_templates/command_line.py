"""Puts the options of every `assay` command where a page says `<!-- commands -->`, read from the command itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook that mkdocs calls for every page."""
    return markdown.replace(MARK, "\n".join(_pages())) if MARK in markdown else markdown


def _pages() -> Iterator[str]:
    import typer

    from assay.cli import app

    yield from _command("assay", typer.main.get_command(app))


def _command(name: str, command: Any) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if not children:
        yield f"\n## {name}\n"
        yield f"{_escaped(command.help or '')}\n"
        yield "| argument or option | meaning | default |\n|---|---|---|"
        for parameter in command.params:
            meaning = _escaped(getattr(parameter, "help", None) or "")
            yield f"| {_spelling(parameter)} | {meaning} | {_default(parameter)} |"
    for child in sorted(children):
        yield from _command(f"{name} {child}", children[child])


def _spelling(parameter: Any) -> str:
    value = parameter.metavar or parameter.name.upper()
    if not parameter.opts[0].startswith("-"):
        return f"`{value}`"
    return f"`{', '.join(parameter.opts)}`" if parameter.is_flag else f"`{', '.join(parameter.opts)} {value}`"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default in (None, False, ()) or callable(parameter.default):
        return ""
    return f"`{parameter.default}`"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
