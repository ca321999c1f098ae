"""Laws of sequences of i.i.d. tokens, collapsed: by types (how often each probability occurs) or onto a lattice.

A token law enters as its distinct probabilities p_g and the chances shares_g that a drawn token has probability p_g.
Source of types: Csiszar and Koerner, Information Theory, chapter 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

from assay.watermark._laws import Floats, Integers

MAX_ATOMS = 300_000  # atoms of the law of the surprisal, and rows of a type table before pruning
MAX_WORK = 20_000_000  # atoms times groups
MAX_GROUPS = 6  # distinct probabilities up to which types are tabled
MAX_TYPES = 4_000  # types over which conditional errors are averaged
DROPPED_MASS = 1e-12  # total mass of types left out

_LATTICE = 2**19
_DAMPING = 24.0


def surprisal_atoms(log_p: Floats, shares: Floats, n: int, ceiling: float) -> tuple[Floats, Floats] | None:
    """Atoms of the law of L = -log rho(X_1..X_n) at or below `ceiling`; exact.

    Parameters
    ----------
    log_p, shares
        float64, shape (groups,), log_p falling.
    n
        Number of tokens.
    ceiling
        In nats.

    Returns
    -------
    (L, log_mass), float64, shape (atoms,), atoms not merged; None if there are too many to list.
    """
    level = np.array([-n * log_p[0]])
    rare = np.zeros(1, dtype=np.int64)  # tokens that are not of the most probable group
    log_mass = np.zeros(1)
    if level[0] > ceiling:
        return np.empty(0), np.empty(0)
    affordable = min(MAX_ATOMS, MAX_WORK // len(log_p))
    for g in range(1, len(log_p)):
        # The ceiling, not n, bounds how often a rare token can occur.
        most = np.minimum(n - rare, np.floor((ceiling - level) / (log_p[0] - log_p[g]))).astype(np.int64)
        if most.sum() + len(most) > affordable:
            return None
        counts = _ranges(most + 1)
        rare = np.repeat(rare, most + 1) + counts
        level = np.repeat(level, most + 1) + counts * (log_p[0] - log_p[g])
        log_mass = np.repeat(log_mass, most + 1) + counts * np.log(shares[g]) - special.gammaln(counts + 1.0)
    common = n - rare
    log_mass += special.gammaln(n + 1.0) - special.gammaln(common + 1.0) + common * np.log(shares[0])
    return level, log_mass


def surprisal_bracket(
    log_p: Floats, shares: Floats, n: int, ceiling: float, loss: Callable[[Floats], Floats]
) -> tuple[float, float]:
    """Lower and upper bound of E loss(L), for a falling loss that vanishes above `ceiling`; any number of atoms.

    Each token's surprisal is rounded up (lower bound) or down (upper bound) to a lattice of 2**18 cells below the
    ceiling; the n-fold convolution is one damped FFT, whose own error, below 1e-9, is added to the bounds.
    """
    cell = 2.0 * ceiling / _LATTICE
    low, high = (_lattice_mean(-log_p / cell, shares, n, cell, ceiling, loss, up=up) for up in (True, False))
    return max(0.0, low - 1e-9), min(1.0, high + 1e-9)


def _lattice_mean(
    position: Floats, shares: Floats, n: int, cell: float, ceiling: float, loss: Callable[[Floats], Floats], *, up: bool
) -> float:
    """E loss of the sum of n lattice surprisals."""
    # A hair of slack before rounding: a position that should be whole may come out one unit in the last place off.
    rounded = np.ceil(position - 1e-9) if up else np.floor(position + 1e-9)
    below = rounded < _LATTICE
    step = np.bincount(rounded[below].astype(np.int64), weights=shares[below], minlength=_LATTICE)
    damping = np.exp(-_DAMPING / _LATTICE * np.arange(_LATTICE))
    law = np.fft.irfft(np.fft.rfft(step * damping) ** n, _LATTICE) / damping
    used = np.arange(int(ceiling / cell) + 1)
    losses = loss(np.asarray(used * cell, dtype=np.float64))
    return float(np.sum(np.maximum(law[used], 0.0) * losses))


def type_table(shares: Floats, n: int, limit: int = MAX_TYPES) -> tuple[Integers, Floats] | None:
    """Types of n tokens and their probabilities, leaving out types of total mass below `DROPPED_MASS`.

    Returns
    -------
    (counts, mass): int64, shape (types, groups), and float64, shape (types,); None if there are more than `limit`.
    """
    if len(shares) > MAX_GROUPS:
        return None
    counts = np.zeros((1, 0), dtype=np.int64)
    for share in shares[:0:-1]:  # the most probable group takes what is left
        spread = 8.5 * np.sqrt(n * share * (1.0 - share)) + 30.0
        first, last = max(0, int(n * share - spread)), min(n, int(n * share + spread))
        width = last - first + 1
        if len(counts) * width > MAX_ATOMS:
            return None
        column = np.tile(np.arange(first, last + 1), len(counts))
        counts = np.column_stack([column, np.repeat(counts, width, axis=0)])
        counts = counts[counts.sum(axis=1) <= n]
    counts = np.column_stack([n - counts.sum(axis=1), counts])
    log_mass = special.gammaln(n + 1.0) + np.sum(counts * np.log(shares) - special.gammaln(counts + 1.0), axis=1)
    order = np.argsort(-log_mass, kind="stable")
    mass = np.exp(log_mass[order])
    keep = 1 + int(np.searchsorted(np.cumsum(mass), 1.0 - DROPPED_MASS))
    if keep > limit:
        return None
    return counts[order[:keep]], mass[:keep]


def _ranges(lengths: Integers) -> Integers:
    """0..lengths[0]-1, 0..lengths[1]-1, ... end to end."""
    ends = np.cumsum(lengths)
    out: Integers = np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - lengths, lengths)
    return out
