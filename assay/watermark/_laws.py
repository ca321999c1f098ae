"""Finite laws as arguments: checked, normalised, and grouped by equal probabilities."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_NUMBERS = (int, float, np.integer, np.floating)

SUM_TOLERANCE = 1e-6  # a softmax in single precision sums to one within this


def check_law(law: npt.ArrayLike, name: str) -> Floats:
    """A probability vector as float64, shape (n,), divided by its sum.

    Raises
    ------
    ValueError
        If it is not one-dimensional with at least one entry, has a negative or non-finite entry, or a sum further than
        1e-6 from one.
    """
    values = np.asarray(law, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must be a one-dimensional array with at least one entry, got shape {values.shape}.")
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        where = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{name} must hold finite probabilities >= 0, got {values[where]} at index {where}.")
    total = math.fsum(values)
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise ValueError(f"{name} must sum to 1 within {SUM_TOLERANCE}, got {total}. Divide it by its sum first.")
    return values / total


def check_level(value: object, name: str) -> float:
    """A number in the open interval (0, 1)."""
    if not isinstance(value, _NUMBERS) or not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}.")
    return float(value)


def check_count(value: object, name: str, low: int, high: int | None = None) -> int:
    """A whole number in [low, high]."""
    # The remainder of infinity is NaN.
    if (
        not isinstance(value, _NUMBERS)
        or isinstance(value, bool)
        or value % 1 != 0
        or value < low
        or (high is not None and value > high)
    ):
        accepted = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be a whole number {accepted}, got {value}.")
    return int(value)


def group_law(law: Floats) -> tuple[Floats, Integers]:
    """The distinct positive probabilities of a law, largest first, and how many atoms have each.

    Returns
    -------
    (log_p, multiplicity): natural logarithms, float64, and int64, both of shape (groups,).
    """
    values, counts = np.unique(law[law > 0.0], return_counts=True)
    log_p: Floats = np.log(values[::-1])
    multiplicity: Integers = counts[::-1].astype(np.int64)
    return log_p, multiplicity


def entropy(law: npt.ArrayLike) -> float:
    """Shannon entropy of a law in nats."""
    values = check_law(law, "law")
    positive = values[values > 0.0]
    return -math.fsum(positive * np.log(positive)) + 0.0
