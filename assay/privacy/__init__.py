"""Privacy: exact noise, a ledger, kernel density, continual release, histograms, a reusable holdout, audits of all."""

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
    from assay.privacy.histogram import NoisyHistogram, publish_histograms
    from assay.privacy.holdout import Holdout, dkw_band
    from assay.privacy.kde import (
        L1KDE,
        L2KDE,
        Clamping,
        GaussianKDE,
        LpKDE,
        corpus_distance,
        release_corpus,
        style_features,
    )
    from assay.privacy.ledger import Ledger, Receipt
    from assay.privacy.noise import (
        NoiseSource,
        SeededNoise,
        gaussian_variance,
        laplace_scale,
        noise_source,
        refuse_seeded,
    )
    from assay.privacy.publish import RatePublisher, Rates

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
    "histogram": ("NoisyHistogram", "publish_histograms"),
    "holdout": ("Holdout", "dkw_band"),
    # Not kde.Plan: `Plan` is that of continual release.
    "kde": (
        "Clamping",
        "GaussianKDE",
        "L1KDE",
        "L2KDE",
        "LpKDE",
        "corpus_distance",
        "release_corpus",
        "style_features",
    ),
    "ledger": ("Ledger", "Receipt"),
    "noise": ("NoiseSource", "SeededNoise", "gaussian_variance", "laplace_scale", "noise_source", "refuse_seeded"),
    "publish": ("RatePublisher", "Rates"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "L1KDE",
    "L2KDE",
    "Budget",
    "BudgetError",
    "Clamping",
    "Cost",
    "Counter",
    "EndlessCounter",
    "GaussianKDE",
    "Grid",
    "Holdout",
    "Ledger",
    "LedgerError",
    "LpKDE",
    "NoiseSource",
    "NoisyHistogram",
    "Odometer",
    "Plan",
    "Quote",
    "RatePublisher",
    "Rates",
    "Receipt",
    "SeededNoise",
    "SeededNoiseError",
    "Selection",
    "SlidingWindow",
    "corpus_distance",
    "dkw_band",
    "gaussian_variance",
    "laplace_scale",
    "noise_source",
    "plan_counter",
    "plan_endless",
    "plan_selection",
    "publish_histograms",
    "quantise",
    "refuse_seeded",
    "release_corpus",
    "style_features",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"assay.privacy.{_HOME[name]}"), name)
    raise AttributeError(f"module 'assay.privacy' has no attribute {name!r}")
