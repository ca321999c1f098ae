"""Privacy: exact noise, accounting and a ledger, continual release, a reusable holdout, audits of all of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from assay.privacy.accounting import Cost, Odometer
    from assay.privacy.budget import Budget, Quote
    from assay.privacy.continual import (
        Counter,
        EndlessCounter,
        Plan,
        Selection,
        SlidingWindow,
        plan_counter,
        plan_endless,
        plan_selection,
    )
    from assay.privacy.errors import BudgetError, LedgerError, SeededNoiseError
    from assay.privacy.grid import Grid, quantise
    from assay.privacy.holdout import Holdout, dkw_band
    from assay.privacy.ledger import Ledger, Receipt
    from assay.privacy.noise import (
        NoiseSource,
        SeededNoise,
        gaussian_variance,
        laplace_scale,
        noise_source,
        refuse_seeded,
    )

# Module -> names: nothing is loaded until it is used.
_NAMES = {
    "accounting": ("Cost", "Odometer"),
    "budget": ("Budget", "Quote"),
    "continual": (
        "Counter",
        "EndlessCounter",
        "Plan",
        "Selection",
        "SlidingWindow",
        "plan_counter",
        "plan_endless",
        "plan_selection",
    ),
    "errors": ("BudgetError", "LedgerError", "SeededNoiseError"),
    "grid": ("Grid", "quantise"),
    "holdout": ("Holdout", "dkw_band"),
    "ledger": ("Ledger", "Receipt"),
    "noise": ("NoiseSource", "SeededNoise", "gaussian_variance", "laplace_scale", "noise_source", "refuse_seeded"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Budget",
    "BudgetError",
    "Cost",
    "Counter",
    "EndlessCounter",
    "Grid",
    "Holdout",
    "Ledger",
    "LedgerError",
    "NoiseSource",
    "Odometer",
    "Plan",
    "Quote",
    "Receipt",
    "SeededNoise",
    "SeededNoiseError",
    "Selection",
    "SlidingWindow",
    "dkw_band",
    "gaussian_variance",
    "laplace_scale",
    "noise_source",
    "plan_counter",
    "plan_endless",
    "plan_selection",
    "quantise",
    "refuse_seeded",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"assay.privacy.{_HOME[name]}"), name)
    raise AttributeError(f"module 'assay.privacy' has no attribute {name!r}")
