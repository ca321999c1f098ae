"""Private kernel density: sums of distances or kernels from a private set to any point, after one noisy release."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from assay.privacy.kde.frame import Clamping
    from assay.privacy.kde.gaussian import GaussianKDE
    from assay.privacy.kde.l1 import L1KDE
    from assay.privacy.kde.l2 import L2KDE
    from assay.privacy.kde.lp import LpKDE
    from assay.privacy.kde.reference_corpus import Distances, corpus_distance, release_corpus, style_features
    from assay.privacy.kde.release import Plan

# Name -> module: nothing is loaded until it is used.
_HOME = {
    "Clamping": "frame",
    "Distances": "reference_corpus",
    "corpus_distance": "reference_corpus",
    "release_corpus": "reference_corpus",
    "style_features": "reference_corpus",
    "GaussianKDE": "gaussian",
    "L1KDE": "l1",
    "L2KDE": "l2",
    "LpKDE": "lp",
    "Plan": "release",
}

__all__ = [
    "L1KDE",
    "L2KDE",
    "Clamping",
    "Distances",
    "GaussianKDE",
    "LpKDE",
    "Plan",
    "corpus_distance",
    "release_corpus",
    "style_features",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"assay.privacy.kde.{_HOME[name]}"), name)
    raise AttributeError(f"module 'assay.privacy.kde' has no attribute {name!r}")
