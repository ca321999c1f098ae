"""Privacy: exact noise, accounting and a ledger, continual release, a reusable holdout, audits of all of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from assay.privacy.errors import BudgetError, LedgerError, SeededNoiseError
    from assay.privacy.noise import NoiseSource, SeededNoise, gaussian_variance, laplace_scale, noise_source
    from assay.privacy.quantise import Grid, quantise

# Name -> module: nothing is loaded until it is used.
_HOME = {
    "BudgetError": "errors",
    "LedgerError": "errors",
    "SeededNoiseError": "errors",
    "NoiseSource": "noise",
    "SeededNoise": "noise",
    "gaussian_variance": "noise",
    "laplace_scale": "noise",
    "noise_source": "noise",
    "Grid": "quantise",
    "quantise": "quantise",
}

__all__ = [
    "BudgetError",
    "Grid",
    "LedgerError",
    "NoiseSource",
    "SeededNoise",
    "SeededNoiseError",
    "gaussian_variance",
    "laplace_scale",
    "noise_source",
    "quantise",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"assay.privacy.{_HOME[name]}"), name)
    raise AttributeError(f"module 'assay.privacy' has no attribute {name!r}")
