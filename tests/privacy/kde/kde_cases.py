"""What the tests of private kernel sums share: noise that is none, small estimators of every construction, oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from assay.privacy.kde import L1KDE, L2KDE, GaussianKDE, LpKDE
from assay.privacy.kde.release import Release

Floats = npt.NDArray[np.float64]


class NoNoise:
    """A source that adds nothing: what is left are the construction's own errors."""

    name = "none"
    seeded = False

    def laplace(self, scale: object, size: tuple[int, int]) -> npt.NDArray[np.int64]:
        return np.zeros(size, dtype=np.int64)

    gaussian = laplace


BUDGETS: dict[str, dict[str, Any]] = {"pure": {"epsilon": 1.0}, "zcdp": {"rho": 0.1}}
MAKERS: dict[str, tuple[type[Release], dict[str, Any]]] = {
    "l1-centred": (L1KDE, {"low": -1.0, "high": 3.0, "dims": 2, "construction": "centred", "depth": 5}),
    "l1-refined": (L1KDE, {"low": -1.0, "high": 3.0, "dims": 2, "construction": "refined", "depth": 5}),
    "l1-rings": (L1KDE, {"low": -1.0, "high": 3.0, "dims": 2, "construction": "rings", "depth": 5, "alpha": 0.3}),
    "l1-histogram": (L1KDE, {"low": -1.0, "high": 3.0, "dims": 2, "construction": "histogram", "depth": 4}),
    "l1-unequal": (L1KDE, {"low": [0.0, -5.0], "high": [0.5, 7.0], "dims": 2, "construction": "centred", "depth": 5}),
    "l2": (L2KDE, {"radius": 2.0, "centre": 1.0, "dims": 2, "projections": 3}),
    "lp-2": (LpKDE, {"power": 2, "low": -1.0, "high": 3.0, "dims": 2}),
    "lp-3": (LpKDE, {"power": 3, "low": -1.0, "high": 3.0, "dims": 2, "depth": 4}),
    "lp-5": (LpKDE, {"power": 5, "low": -1.0, "high": 3.0, "dims": 2, "depth": 3}),
    "lp-8": (LpKDE, {"power": 8, "low": [-1.0, 0.0], "high": [3.0, 1.0], "dims": 2}),
    "features": (GaussianKDE, {"bandwidth": 1.0, "dims": 2, "construction": "features", "pairs": 7}),
    "cells-1": (GaussianKDE, {"bandwidth": 1.0, "dims": 1, "construction": "cells", "low": -1.0, "high": 3.0}),
    "cells-2": (GaussianKDE, {"bandwidth": 1.0, "dims": 2, "construction": "cells", "low": -1.0, "high": 3.0}),
    "cells-3": (GaussianKDE, {"bandwidth": 2.0, "dims": 3, "construction": "cells", "low": -1.0, "high": 3.0}),
}


def make(name: str, budget: str = "pure", adjacency: str = "add-remove", **extra: Any) -> Any:
    """A small estimator."""
    home, settings = MAKERS[name]
    rest = {"n": 20, "adjacency": adjacency, "unit": "document", **BUDGETS[budget], **extra}
    return home(**{**settings, **rest})


def brute(name: str, points: Floats, queries: Floats) -> Floats:
    """Exact sums, term by term."""
    home, settings = MAKERS[name]
    difference = points[:, None, :] - queries[None, :, :]
    if home is L1KDE:
        terms = np.abs(difference).sum(axis=2)
    elif home is L2KDE:
        terms = np.sqrt((difference**2).sum(axis=2))
    elif home is LpKDE:
        terms = (np.abs(difference) ** settings["power"]).sum(axis=2)
    else:
        terms = np.exp(-(difference**2).sum(axis=2) / (2 * settings["bandwidth"] ** 2))
    return terms.sum(axis=0)
