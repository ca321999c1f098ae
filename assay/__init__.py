"""Assay: tests where text came from, and says how sure it is."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Loaded on first use, so that `import assay` costs milliseconds and never pulls in torch.
_HOME = {
    "AssayError": "assay._errors",
    "GumbelConfig": "assay.watermark.gumbel",
    "Keyring": "assay.watermark.keyring",
    "Report": "assay.report",
    "SecretKey": "assay.watermark.keys",
    "TestResult": "assay.detection.result",
    "detect": "assay.detection.detect",
}
_ROOMS = ("conformal", "detection", "kernels", "models", "privacy", "report", "service", "watermark")

if TYPE_CHECKING:
    from assay._errors import AssayError
    from assay.detection.detect import detect
    from assay.detection.result import TestResult
    from assay.report import Report
    from assay.watermark.gumbel import GumbelConfig
    from assay.watermark.keyring import Keyring
    from assay.watermark.keys import SecretKey

__all__ = ["AssayError", "GumbelConfig", "Keyring", "Report", "SecretKey", "TestResult", "__version__", "detect"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        value: object = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"assay.{name}")
    raise AttributeError(f"module 'assay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})
