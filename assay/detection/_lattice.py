"""Laws on the integers and their convolution, with every error accounted for: what `convolution` computes with.

Reference: Higham (2002), Accuracy and Stability of Numerical Algorithms, Thm 24.2, for the error of an FFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_UNIT = 2.0**-53
_DROPPED = 1e-15  # mass that one convolution may leave out at either end; it is accounted for
_DIRECT = 24  # a factor this short is convolved directly
_ATOMS = 16  # terms are first merged as lists of atoms, up to this many


@dataclass(frozen=True)
class Law:
    """Masses on consecutive integers from `start`; how many integers the law spans, those cut off included.

    dropped: mass that was cut off. error: bound on the Euclidean norm of the errors of all masses.
    """

    start: int
    masses: Floats
    span: int
    dropped: float = 0.0
    error: float = 0.0

    def log_tail(self, theta: float, step: float, threshold: float, missed: float, side: int, *, exact: bool) -> float:
        """log of E exp(-theta X) 1{X >= threshold}, X = step times the integer: a bound from above (side 1) or below.

        missed: mass at the threshold that is not in the law. exact: whether the threshold has no rounding error.
        """
        cell = threshold / step
        # An integer this near the threshold may count or not: the one that hurts is taken.
        doubt = 0.0 if exact else 1e-9 + 8.0 * _UNIT * abs(cell)
        start = max(0, math.ceil(cell - side * doubt) - self.start)
        # The norm of exp(-theta step j) over j >= 0, or over as many as there are.
        decay = -math.expm1(-2.0 * theta * step)
        norm = math.sqrt(min(float(self.span), 1.0 / decay if decay > 0.0 else math.inf))
        slack = missed + self.dropped + self.error * norm
        log_total, log_slack = -math.inf, math.log(slack) if slack > 0.0 else -math.inf
        held = start + np.flatnonzero(self.masses[start:])
        if len(held):
            # Relative to the first integer that counts, which may lie many units of 1 / theta above the threshold.
            weights = np.exp(-theta * step * (held - held[0]).astype(np.float64))
            ahead = max(float(self.start + held[0]) - cell, -doubt)
            log_total = math.log(float(weights @ self.masses[held])) - theta * step * ahead
        if side > 0:
            return float(np.logaddexp(log_total, log_slack)) - theta * threshold
        if log_total <= log_slack:
            return -math.inf
        return log_total + math.log(-math.expm1(log_slack - log_total)) - theta * threshold


def sum_law(k: Counts, q: Floats, counts: Floats) -> Law:
    """The law of the sum of the lattice terms."""
    once = counts == 1.0
    atoms, masses = k[once], q[once]
    # Small terms are merged as lists of atoms, all at once: nothing is rounded or widened.
    while len(atoms) > 1 and atoms.shape[1] ** 2 <= _ATOMS:
        if len(atoms) % 2:
            atoms = np.vstack([atoms, np.zeros((1, atoms.shape[1]), dtype=np.int64)])
            masses = np.vstack([masses, np.eye(1, atoms.shape[1])])
        atoms = (atoms[0::2, :, None] + atoms[1::2, None, :]).reshape(len(atoms) // 2, -1)
        masses = (masses[0::2, :, None] * masses[1::2, None, :]).reshape(len(masses) // 2, -1)
    laws = [_dense(*row) for row in zip(atoms, masses, strict=True)]
    rows = zip(k[~once], q[~once], counts[~once].tolist(), strict=True)
    laws += [_power(_dense(atoms, masses), int(count)) for atoms, masses, count in rows]
    while len(laws) > 1:
        laws.sort(key=lambda law: len(law.masses))
        odd = laws[-1:] if len(laws) % 2 else []
        laws = [_convolved(a, b) for a, b in zip(laws[0::2], laws[1::2], strict=False)] + odd
    return laws[0]


def _dense(atoms: Counts, masses: Floats) -> Law:
    start = int(atoms.min())
    law = np.bincount(atoms - start, weights=masses).astype(np.float64)
    return _cropped(start, law, len(law), 0.0, 0.0)


def _power(law: Law, count: int) -> Law:
    """The law of the sum of `count` independent copies, by squaring."""
    result = Law(0, np.ones(1), 1)
    while True:
        if count & 1:
            result = _convolved(result, law)
        count >>= 1
        if count == 0:
            return result
        law = _convolved(law, law)


def _convolved(a: Law, b: Law) -> Law:
    shorter = min(len(a.masses), len(b.masses))
    if shorter <= _DIRECT:
        masses = np.convolve(a.masses, b.masses)
        local = (shorter + 2) * _UNIT * float(np.linalg.norm(masses))
    else:
        size = fft.next_fast_len(len(a.masses) + len(b.masses) - 1, real=True)
        transform = fft.rfft(a.masses, size)
        transform *= transform if b is a else fft.rfft(b.masses, size)
        masses = np.maximum(fft.irfft(transform, size)[: len(a.masses) + len(b.masses) - 1], 0.0)
        # Three transforms, each off by at most 8 log2(size) units of the norm; |a|_1 and |b|_1 are at most 1.
        largest = max(float(np.linalg.norm(a.masses)), float(np.linalg.norm(b.masses)))
        local = 3.0 * 8.0 * math.log2(size) * _UNIT * largest
    span = a.span + b.span - 1
    return _cropped(a.start + b.start, masses, span, a.dropped + b.dropped, a.error + b.error + local)


def _cropped(start: int, masses: Floats, span: int, dropped: float, error: float) -> Law:
    """Without the ends, which hold next to nothing; what they hold is remembered."""
    below, above = np.cumsum(masses), np.cumsum(masses[::-1])
    left, right = int(np.searchsorted(below, _DROPPED)), int(np.searchsorted(above, _DROPPED))
    lost = (float(below[left - 1]) if left else 0.0) + (float(above[right - 1]) if right else 0.0)
    return Law(start + left, masses[left : len(masses) - right], span, dropped + lost, error)
