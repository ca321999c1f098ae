"""The HTTP service: keys, detection, jobs over corpora, completions with a mark, reports, telemetry, a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from assay.service.settings import Settings

if TYPE_CHECKING:
    from assay.service.app import create_app

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> object:
    # FastAPI comes with the application: the settings need nothing.
    if name == "create_app":
        from assay.service.app import create_app

        return create_app
    raise AttributeError(f"module 'assay.service' has no attribute {name!r}")
