"""Templates to pages. Everything is escaped; nothing is fetched but the style sheet of this service."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from assay import __version__
from assay.report.render import pvalue_html, visible

if TYPE_CHECKING:
    from jinja2 import Environment


def page(name: str, **values: Any) -> str:
    """A template filled in."""
    return _environment().get_template(f"{name}.html.j2").render(**values)


@cache
def style() -> tuple[bytes, str]:
    """The style sheet, and a tag that changes with it."""
    content = resources.files("assay.service.pages").joinpath("page.css").read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:16]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("assay.service", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.globals.update(version=__version__, style_tag=style()[1])
    made.filters.update(visible=visible, pvalue=pvalue_html, count=lambda number: f"{number:,}", when=_when)
    return made


def _when(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
