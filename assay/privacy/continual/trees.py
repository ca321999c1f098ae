"""Counters from sums over nodes of a tree: which nodes a prefix uses, and what their noise adds up to.

Each `Factorisation` writes the prefix sums as A = L C: C sums the steps of each node, L adds nodes up to prefixes. One
step touches `l1` nodes, so node noise Laplace(l1 / epsilon) is epsilon-DP and Gaussian noise of variance
l2_squared / (2 rho) is rho-zCDP; a release then has `rows(t)` times the variance of one node.
References: Dwork et al. (2010), Chan et al. (2011) (binary tree); Honaker (2015) (variance-weighted nodes); Andersson,
Pagh (2023), arXiv:2306.09666 (smooth); Andersson, Pagh, Steiner, Torkamani (2024), arXiv:2408.07021 (k-ary).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Times = npt.NDArray[np.int64]

MAX_HORIZON = 2**40


class Factorisation(Protocol):
    """What the planner asks of a mechanism; `horizon` T means releases at times 1 .. T.

    Attributes
    ----------
    name
        For plans and reports.
    horizon
        Largest time T.
    l1
        Number of nodes that one step touches; None where only Gaussian noise makes sense.
    l2_squared
        Largest squared column norm of C.
    memory
        Numbers that the running counter keeps.
    """

    @property
    def name(self) -> str:
        """For plans and reports."""

    @property
    def horizon(self) -> int:
        """Largest time."""

    @property
    def l1(self) -> int | None:
        """Nodes that one step touches."""

    @property
    def l2_squared(self) -> float:
        """Largest squared column norm of C."""

    @property
    def memory(self) -> int:
        """Numbers that the running counter keeps."""

    def rows(self, times: Times) -> Floats:
        """Squared row norms of L at times in 1 .. horizon."""


@dataclass(frozen=True)
class Plain:
    """Noise on every step: one node per step, t of them in a prefix. The baseline."""

    horizon: int
    name = "plain"
    l1 = 1
    l2_squared = 1.0
    memory = 1

    def __post_init__(self) -> None:
        check_horizon(self.horizon)

    def rows(self, times: Times) -> Floats:
        """Squared row norms of L: t."""
        return checked_times(times, self.horizon).astype(np.float64)


@dataclass(frozen=True)
class BinaryTree:
    """The binary tree: a prefix of length t is one node for each one-bit of t.

    With `left_only` the root and all right children, which no prefix below T uses, are left out; the last time is then
    T - 1 for T a power of two. The horizon is rounded up inside.
    """

    horizon: int
    left_only: bool = True
    name = "binary tree"

    def __post_init__(self) -> None:
        check_horizon(self.horizon)

    @property
    def levels(self) -> int:
        """Nodes above one step."""
        return self.horizon.bit_length() if self.left_only else (self.horizon - 1).bit_length() + 1

    @property
    def l1(self) -> int:
        """Nodes that one step touches; a left child at each level at most, or any node and the root."""
        return self.levels

    @property
    def l2_squared(self) -> float:
        """As `l1`: C holds zeros and ones."""
        return float(self.levels)

    @property
    def memory(self) -> int:
        """One noisy node per level."""
        return self.levels

    def rows(self, times: Times) -> Floats:
        """One-bits of t."""
        return popcount(checked_times(times, self.horizon)).astype(np.float64)


@dataclass(frozen=True)
class Honaker:
    """The binary tree, each node averaged with what its children say; never worse than half of them at no cost.

    A node's variance falls to v_i with v_0 = 1 and v_i = 1 / (1 + 1 / (2 v_(i-1))), in units of one node's noise.
    """

    horizon: int
    left_only: bool = False
    name = "Honaker"

    def __post_init__(self) -> None:
        check_horizon(self.horizon)

    @property
    def levels(self) -> int:
        """Nodes above one step. Right children are noised too: they improve their parents."""
        return (self.horizon - 1).bit_length() + 1

    @property
    def l1(self) -> int:
        """Nodes that one step touches."""
        return self.levels

    @property
    def l2_squared(self) -> float:
        """As `l1`."""
        return float(self.levels)

    @property
    def memory(self) -> int:
        """A sum and an estimate per level."""
        return 2 * self.levels

    def rows(self, times: Times) -> Floats:
        """Sum of v_i over the one-bits i of t."""
        checked = checked_times(times, self.horizon)
        found = np.zeros(checked.shape)
        for level, variance in enumerate(node_variances(self.levels)):
            found += variance * (checked >> level & 1)
        return found


def node_variances(levels: int) -> Floats:
    """Variance of Honaker's node estimates from the leaves up, in units of one node's noise."""
    variances = [1.0]
    while len(variances) < levels:
        variances.append(1 / (1 + 1 / (2 * variances[-1])))
    return np.array(variances)


@dataclass(frozen=True)
class KaryTree:
    """The k-ary tree with subtraction: prefixes by balanced digits of t, |digit| <= (k - 1) / 2; negative subtract.

    Attributes
    ----------
    arity
        Odd k, at least 3. `best_arity` searches it: heights are integers, so 19, best in the limit, is not always best.
    """

    horizon: int
    arity: int = 19
    name = "k-ary tree"

    def __post_init__(self) -> None:
        check_horizon(self.horizon)
        if type(self.arity) is not int or self.arity < 3 or self.arity % 2 == 0:
            raise ValueError(f"arity must be an odd integer of at least 3, got {self.arity!r}.")

    @property
    def levels(self) -> int:
        """Smallest height whose balanced numbers reach the horizon: (k^height - 1) / 2 >= T."""
        height = 1
        while (self.arity**height - 1) // 2 < self.horizon:
            height += 1
        return height

    @property
    def l1(self) -> int:
        """Nodes that one step touches: one per level."""
        return self.levels

    @property
    def l2_squared(self) -> float:
        """As `l1`."""
        return float(self.levels)

    @property
    def memory(self) -> int:
        """Per level the nodes that are still to be subtracted, and a sum."""
        return self.levels * ((self.arity - 1) // 2 + 2)

    def rows(self, times: Times) -> Floats:
        """Sum of the absolute balanced digits of t."""
        rest = checked_times(times, self.horizon).copy()
        found = np.zeros(rest.shape)
        half = (self.arity - 1) // 2
        while rest.any():
            digit = (rest + half) % self.arity - half
            found += np.abs(digit)
            rest = (rest - digit) // self.arity
        return found


@dataclass(frozen=True)
class SmoothTree:
    """The smooth binary tree: only leaves whose path has as many left as right turns, so every release is alike.

    Step t is put on the t-th such leaf: its path turns left h/2 times, which is its number of nodes, and a prefix has
    one node for each of the h/2 right turns. Each variance is (h/2) times a node's.
    """

    horizon: int
    name = "smooth tree"

    def __post_init__(self) -> None:
        check_horizon(self.horizon)

    @property
    def height(self) -> int:
        """Smallest even h with h-choose-h/2 >= T + 1 leaves."""
        height = 2
        while math.comb(height, height // 2) < self.horizon + 1:
            height += 2
        return height

    @property
    def l1(self) -> int:
        """Nodes that one step touches."""
        return self.height // 2

    @property
    def l2_squared(self) -> float:
        """As `l1`."""
        return float(self.height // 2)

    @property
    def memory(self) -> int:
        """One noisy node per level."""
        return self.height

    def rows(self, times: Times) -> Floats:
        """h/2 at every time."""
        return np.full(checked_times(times, self.horizon).shape, float(self.height // 2))


@functools.lru_cache(maxsize=256)
def best_arity(horizon: int, *, largest: int = 101) -> int:
    """The odd arity with the smallest largest variance l1^2 rows(t) over t = 1 .. horizon; ties go to the smaller mean.

    Parameters
    ----------
    horizon
        T.
    largest
        Largest arity tried.
    """
    check_horizon(horizon)
    found = []
    for arity in range(3, largest + 1, 2):
        tree = KaryTree(horizon, arity)
        mean, worst = _kary_rows(horizon, arity)
        found.append((tree.levels**2 * worst, tree.levels**2 * mean, arity))
    return min(found)[2]


def mean_and_max_rows(design: Factorisation) -> tuple[float, float]:
    """Mean and maximum of `rows(t)` over t = 1 .. horizon, exactly and without going through all of them for trees."""
    if isinstance(design, KaryTree):
        return _kary_rows(design.horizon, design.arity)
    if isinstance(design, BinaryTree):
        return _bit_rows(design.horizon, np.ones(design.horizon.bit_length()))
    if isinstance(design, Honaker):
        return _bit_rows(design.horizon, node_variances(design.horizon.bit_length()))
    if isinstance(design, Plain):
        return (design.horizon + 1) / 2, float(design.horizon)
    if isinstance(design, SmoothTree):
        return float(design.height // 2), float(design.height // 2)
    mean = getattr(design, "mean_row", None)
    if mean is not None:  # rows of Toeplitz designs never fall
        return mean(), float(design.rows(np.array([design.horizon]))[0])
    rows = design.rows(np.arange(1, design.horizon + 1))
    return float(rows.mean()), float(rows.max())


def _bit_rows(horizon: int, weights: Floats) -> tuple[float, float]:
    """Mean over 1 .. T and maximum of the weighted one-bits of t."""
    total = 0.0
    for level, weight in enumerate(weights):
        period = 2 ** (level + 1)
        whole, rest = divmod(horizon + 1, period)
        total += weight * (whole * (period // 2) + max(0, rest - period // 2))
    # The largest: T itself, or T with a one-bit cleared and all ones below it.
    candidates = [horizon, *((horizon >> i << i) - 1 for i in range(horizon.bit_length()) if horizon >> i & 1)]
    best = max(sum(w for i, w in enumerate(weights) if t >> i & 1) for t in candidates)
    return total / horizon, float(best)


def _kary_rows(horizon: int, arity: int) -> tuple[float, float]:
    """Mean over 1 .. T and maximum of the absolute balanced digits, digit by digit from the top."""
    half = (arity - 1) // 2
    height = 1
    while (arity**height - 1) // 2 < horizon:
        height += 1
    full = (arity * arity - 1) / (4 * arity)  # mean of |digit| over all k of them

    # Over t = -reach .. limit with `levels` free digits: how many, their sum of rows, their largest row.
    def below(limit: int, levels: int) -> tuple[int, float, int]:
        reach = (arity**levels - 1) // 2
        if limit >= reach:
            return arity**levels, arity**levels * levels * full, half * levels
        if limit < -reach:
            return 0, 0.0, -1
        size = arity ** (levels - 1)
        count, total, worst = 0, 0.0, -1
        for digit in range(-half, half + 1):
            inner = below(limit - digit * size, levels - 1)
            if inner[0]:
                count += inner[0]
                total += inner[1] + abs(digit) * inner[0]
                worst = max(worst, inner[2] + abs(digit))
        return count, total, worst

    # Rows of t and -t are alike, so those of 1 .. T are what T has beyond the lower half.
    reach = (arity**height - 1) // 2
    _, total, _ = below(horizon, height)
    lower = (arity**height * height * full) / 2
    return (total - lower) / horizon, float(_kary_max(horizon, arity, height, reach))


def _kary_max(horizon: int, arity: int, height: int, reach: int) -> int:
    """Largest sum of absolute balanced digits over 0 .. T: the top digits of T, one lowered or not, the rest free."""
    half = (arity - 1) // 2
    digits, rest = [], horizon
    for _ in range(height):
        digit = (rest + half) % arity - half
        digits.append(digit)
        rest = (rest - digit) // arity
    digits.reverse()
    best, kept = sum(map(abs, digits)), 0
    positive = False  # whether a nonzero digit stands above: below zero nothing counts
    for place, digit in enumerate(digits):
        free = height - place - 1
        for lower in range(-half if positive else 0, digit):
            # With 0 as the first digit the next nonzero one must be positive: it may be, its size is free.
            best = max(best, kept + abs(lower) + half * free)
        kept += abs(digit)
        positive = positive or digit > 0
    return best


def popcount(values: Times) -> Times:
    """One-bits of each."""
    counts: Times = np.zeros(values.shape, dtype=np.int64)
    rest = values.copy()
    while rest.any():
        counts += rest & 1
        rest >>= 1
    return counts


def check_horizon(horizon: int) -> None:
    """Raise ValueError unless it is an integer in [1, 2**40]."""
    if type(horizon) is not int or not 1 <= horizon <= MAX_HORIZON:
        raise ValueError(f"horizon must be an integer in [1, 2**40], got {horizon!r}.")


def checked_times(times: Times, horizon: int) -> Times:
    """Times as int64; raises ValueError unless all are in [1, horizon]."""
    array = np.asarray(times)
    if array.dtype.kind not in "iu":
        raise TypeError(f"times must be integers, got {array.dtype}.")
    if array.size and (array.min() < 1 or array.max() > horizon):
        raise ValueError(f"times must be in [1, {horizon}], got {array.min()} to {array.max()}.")
    return array.astype(np.int64)
