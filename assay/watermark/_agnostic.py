"""The best watermark whose rejection law ignores rho: R uniform over the k-subsets of n atoms, for every rho alike.

The pairs (mass w(x) = P(X = x, X in R)) that some coupling attains form a polymatroid: w(A) <= f(|A|) for every set A,
f(a) = 1 - C(n-a, k) / C(n, k), by Strassen's theorem. The greedy point of it under w <= rho is optimal, and a point of
it is a mixture of orders "R yields its first element in this order", which needs no max-flow over C(n, k) subsets.
Source: Huang et al. (2023), arXiv:2312.07930, Theorem 3.5; Edmonds (1970), polymatroids; Hardy, Littlewood, Polya.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.watermark._laws import Floats, Integers, check_count, check_law

MAX_JOINT_ATOMS = 12


def agnostic_type2_error(rho: npt.ArrayLike, k: int) -> float:
    """The smallest Type II error for X ~ rho when R is uniform over the k-subsets; the Type I error is k / n.

    Parameters
    ----------
    rho
        float64, shape (n,): the law of the output; atoms of probability zero count in n.
    k
        Size of the rejection region, in 1..n.

    Returns
    -------
    max over a = 0..n of C(n-a, k) / C(n, k) - (mass outside the a largest atoms), in [0, 1). O(n log n).

    Raises
    ------
    ValueError
        If rho is not a law or k is outside 1..n.
    """
    law = check_law(rho, "rho")
    region = check_count(k, "k", 1, len(law))
    # The mass outside the top a, summed from the smallest: a one minus the top would lose the digits of a small error.
    outside = np.concatenate([np.cumsum(np.sort(law))[::-1], [0.0]])
    outside[0] = 1.0
    return max(0.0, float(np.max(missed(len(law), region) - outside)))


def missed(n: int, k: int) -> Floats:
    """C(n-a, k) / C(n, k) for a = 0..n: the chance that a uniform k-subset misses a given set of a atoms."""
    return np.concatenate([[1.0], np.exp(_log_missed(n, k)), np.zeros(k)])


def _log_missed(n: int, k: int) -> Floats:
    """Logarithms of `missed` for a = 1..n-k, where it is positive."""
    out: Floats = np.cumsum(np.log1p(-k / (n - np.arange(n - k))))
    return out


def minimax_excess(n: int, k: int) -> float:
    """How much worse than the best the best rho-agnostic watermark can be: max over rho on n atoms, at alpha = k / n.

    Where n / k is whole this is C(n - n/k, k) / C(n, k), attained by rho uniform on n/k atoms; else the larger of that
    ratio at n/k rounded up, and a k/n - 1 + C(n - a, k) / C(n, k) at a = n/k rounded down. With alpha fixed it grows
    towards (1 - alpha)^(1 / alpha) as n grows, and that towards 1/e = 0.3679 as alpha falls to 0.

    Parameters
    ----------
    n
        Number of atoms, at least 1.
    k
        Size of the rejection region, in 1..n.

    Raises
    ------
    ValueError
        If n or k is out of range.
    """
    size = check_count(n, "n", 1)
    region = check_count(k, "k", 1, size)
    chance = missed(size, region)
    below, above = size // region, -(-size // region)
    return max(0.0, float(chance[above]), below * region / size - 1.0 + float(chance[below]))


@dataclass(frozen=True)
class AgnosticCoupling:
    """A coupling of X ~ rho with R uniform over k-subsets that attains `agnostic_type2_error`.

    R yields its first element in a random order of the atoms; X is that element with probability keep, else a draw
    from the residual rho - w, which then lies outside R.

    Attributes
    ----------
    law
        float64, shape (n,): rho.
    k
        Size of R.
    hit
        float64, shape (n,): w(x) = P(X = x, X in R).
    keep
        float64, shape (n,): chance that X is the element x that R yielded.
    order
        int64, shape (n,): atoms from the most to the least probable; slot i holds atom order[i] before any swap.
    swaps
        Triples (i, j, chance): slots exchanged one after the other, independently.
    """

    law: Floats
    k: int
    hit: Floats
    keep: Floats
    order: Integers
    swaps: tuple[tuple[int, int, float], ...]

    @property
    def type2_error(self) -> float:
        """P(X not in R)."""
        return max(0.0, math.fsum(self.law - self.hit))

    def sample(self, rng: np.random.Generator, size: int) -> tuple[Integers, Integers]:
        """Draws of (X, R): int64 of shape (size,) and, sorted within rows, (size, k). O(size * n) time and memory."""
        n = len(self.law)
        regions = np.sort(np.argsort(rng.random((size, n)), axis=1)[:, : self.k], axis=1).astype(np.int64)
        slots = np.empty((size, n), dtype=np.int64)
        slots[:, self.order] = np.arange(n)
        for i, j, chance in self.swaps:
            a, b = self.order[i], self.order[j]
            rows = np.flatnonzero(rng.random(size) < chance)
            slots[rows, a], slots[rows, b] = slots[rows, b], slots[rows, a]
        first = np.argmin(np.take_along_axis(slots, regions, axis=1), axis=1)
        x = regions[np.arange(size), first]
        lost = rng.random(size) >= self.keep[x]
        if lost.any():
            residual = self._residual()
            x[lost] = rng.choice(n, size=int(lost.sum()), p=residual)
        return x, regions

    def joint(self) -> tuple[Integers, Floats]:
        """The whole law of (X, R), for n up to 12.

        Returns
        -------
        (regions, probability): int64, shape (C(n, k), k), and float64, shape (C(n, k), n): P(R = regions[i], X = x).

        Raises
        ------
        ValueError
            If rho has more than 12 atoms.
        """
        n = len(self.law)
        if n > MAX_JOINT_ATOMS:
            raise ValueError(f"joint() lists every region and needs at most {MAX_JOINT_ATOMS} atoms, got {n}. Sample.")
        orders: dict[tuple[int, ...], float] = {tuple(range(n)): 1.0}
        for i, j, chance in self.swaps:
            mixed: dict[tuple[int, ...], float] = {}
            for slots, weight in orders.items():
                swapped = list(slots)
                swapped[i], swapped[j] = swapped[j], swapped[i]
                mixed[slots] = mixed.get(slots, 0.0) + weight * (1.0 - chance)
                mixed[tuple(swapped)] = mixed.get(tuple(swapped), 0.0) + weight * chance
            orders = mixed
        regions = np.array(list(itertools.combinations(range(n), self.k)), dtype=np.int64)
        rank = np.empty(n, dtype=np.int64)
        rank[self.order] = np.arange(n)
        yielded = np.zeros((len(regions), n))
        for slots, weight in orders.items():
            slot_of_atom = np.array(slots)[rank]
            first = regions[np.arange(len(regions)), np.argmin(slot_of_atom[regions], axis=1)]
            yielded[np.arange(len(regions)), first] += weight
        kept = yielded * self.keep
        lost = np.maximum(0.0, 1.0 - kept.sum(axis=1))
        return regions, (kept + lost[:, None] * self._residual()) / len(regions)

    def _residual(self) -> Floats:
        """The law of X where it is not the element that R yielded."""
        residual = np.maximum(self.law - self.hit, 0.0)
        total = residual.sum()
        return residual / total if total > 0.0 else self.law


def agnostic_coupling(rho: npt.ArrayLike, k: int) -> AgnosticCoupling:
    """The coupling that attains `agnostic_type2_error`, for any n: O(n log n) to build, O(n) a draw.

    Parameters
    ----------
    rho, k
        As in `agnostic_type2_error`.

    Raises
    ------
    ValueError
        If rho is not a law or k is outside 1..n.
    """
    law = check_law(rho, "rho")
    n = len(law)
    region = check_count(k, "k", 1, n)
    order = np.argsort(-law, kind="stable").astype(np.int64)
    reach = np.concatenate([[0.0], -np.expm1(_log_missed(n, region)), np.ones(region)])  # f(0), ..., f(n)
    hit = _greedy(law[order], reach)
    whole = _raise_lowest(hit, 1.0)
    swaps = _swaps(np.diff(reach), whole)
    keep = np.divide(hit, whole, out=np.ones(n), where=whole > 0.0)
    unsorted_hit, unsorted_keep = np.empty(n), np.empty(n)
    unsorted_hit[order], unsorted_keep[order] = hit, keep
    return AgnosticCoupling(law=law, k=region, hit=unsorted_hit, keep=unsorted_keep, order=order, swaps=swaps)


def _greedy(law: Floats, reach: Floats) -> Floats:
    """The largest w <= law with w(A) <= reach[|A|] for every A; law falls, and then so does w."""
    hit = np.empty(len(law))
    room, total = math.inf, 0.0
    for i, mass in enumerate(law):
        # Over the sets that consist of atom i and the b largest before it; those are the binding ones.
        room = min(room, reach[i + 1] - total)
        hit[i] = max(0.0, min(mass, room))
        total += hit[i]
    return hit


def _raise_lowest(values: Floats, total: float) -> Floats:
    """max(values, level), with the level that makes the sum `total`; values fall and sum to at most `total`.

    The result stays in the polymatroid: on the raised part its partial sums are a chord under the concave f.
    """
    n = len(values)
    before = np.concatenate([[0.0], np.cumsum(values)[:-1]])
    levels = (total - before) / (n - np.arange(n))  # the level if atoms i, i+1, ... are the raised ones
    first = int(np.argmax(levels >= values)) if np.any(levels >= values) else n - 1
    out = values.copy()
    out[first:] = np.maximum(levels[first], values[first:])
    return out


def _swaps(start: Floats, target: Floats) -> tuple[tuple[int, int, float], ...]:
    """Random transpositions that turn `start` into `target` on average; start majorises target, both fall.

    Muirhead's construction: a surplus is passed on from the last slot that has one to the first later slot that lacks
    some; each transfer settles one slot, so there are fewer than n.
    """
    current = start.copy()
    givers: list[int] = []
    swaps = []
    for j, want in enumerate(target):
        while current[j] < want and givers:
            i = givers[-1]
            amount = min(current[i] - target[i], want - current[j])
            if amount > 0.0:
                swaps.append((i, j, float(amount / (current[i] - current[j]))))
            current[i] -= amount
            settled = amount == want - current[j]
            current[j] = want if settled else current[j] + amount
            if current[i] <= target[i]:
                givers.pop()
            if settled:
                break
        if current[j] > want:
            givers.append(j)
    return tuple(swaps)
