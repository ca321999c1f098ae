"""Histograms over public bins with discrete Laplace noise: epsilon-DP for one unit that falls into one bin of each.

Adding or removing a unit changes one count by 1, replacing it changes two: the l1 sensitivity is 1 or 2. Reference:
Dwork, McSherry, Nissim, Smith (2006), example 1; Ghosh, Roughgarden, Sundararajan (2009) for the discrete law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Cost, exact
from assay.privacy.ledger import Ledger
from assay.privacy.noise import NoiseSource, Real, laplace_scale, noise_source


@dataclass(frozen=True)
class NoisyHistogram:
    """One published histogram.

    Attributes
    ----------
    counts
        Noisy counts, one per bin; may be negative.
    standard_error
        Of each count, from the noise alone.
    half_width
        Every count of this histogram is within this of the truth with probability at least 0.95.
    """

    counts: tuple[int, ...]
    standard_error: float
    half_width: float


def publish_histograms(
    counts: Mapping[str, npt.ArrayLike],
    ledger: Ledger,
    *,
    epsilon: Real,
    noise: NoiseSource | None = None,
    note: str = "histograms",
) -> dict[str, NoisyHistogram]:
    """Pay for some histograms, then publish them.

    Guarantee: epsilon-DP together, for the ledger's adjacency and unit, if every unit falls into at most one bin of
    each histogram and the bins were fixed without the data.

    Parameters
    ----------
    counts
        For each histogram its counts: non-negative integers, shape (bins,).
    ledger
        Pays; see `Ledger.spend`.
    epsilon
        For all of them together; each gets an equal part.
    noise
        Default `noise_source()`; a seeded one is refused.
    note
        What the ledger says it was for.

    Returns
    -------
    One `NoisyHistogram` per name.

    Raises
    ------
    BudgetError
        If epsilon does not fit; nothing is published.
    ValueError
        On counts that are no histogram, or epsilon <= 0.
    """
    if not counts:
        raise ValueError("counts must hold at least one histogram, got none.")
    checked = {name: _checked(name, values) for name, values in counts.items()}
    total = exact(epsilon, "epsilon")
    if total <= 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    budget = ledger.budget
    sensitivity = 1 if budget.adjacency == "add-remove" else 2
    scale = laplace_scale(Fraction(sensitivity * len(checked)) / total)
    source = noise if noise is not None else noise_source()
    ledger.spend(Cost.pure(total, adjacency=budget.adjacency, unit=budget.unit), noise=source, note=note)
    out = {}
    for name, values in checked.items():
        drawn = np.asarray(source.laplace(scale, (len(values),)), dtype=np.int64)
        noisy = tuple(int(count) for count in values + drawn)
        out[name] = NoisyHistogram(noisy, _standard_error(float(scale)), _half_width(float(scale), len(values)))
    return out


def _checked(name: str, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(
            f"counts[{name!r}] must be non-negative integers of shape (bins,), got {array.dtype} {array.shape}."
        )
    return array.astype(np.int64)


def _standard_error(scale: float) -> float:
    """sqrt(2 q) / (1 - q), q = exp(-1 / scale): of the discrete Laplace law P(x) = (1 - q) / (1 + q) q^|x|."""
    q = math.exp(-1.0 / scale)
    return math.sqrt(2.0 * q) / -math.expm1(-1.0 / scale)


def _half_width(scale: float, bins: int) -> float:
    """The least m with bins P(|x| > m) <= 0.05; P(|x| > m) = 2 q^(m + 1) / (1 + q)."""
    q = math.exp(-1.0 / scale)
    needed = math.log(0.05 * (1.0 + q) / (2.0 * bins)) * -scale - 1.0
    return float(max(0, math.ceil(needed - 1e-12)))
