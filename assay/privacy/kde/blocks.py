"""What a release is made of: blocks of integers, each with its sensitivity and its noise, and how a budget is split.

Guarantee: a block whose integers move by at most `l1` (Laplace) or `squared` (Gaussian, sum of squares) when one record
comes or goes loses l1 / scale of epsilon or squared / (2 variance) of rho; losses of blocks add up. All are
exact rationals.
References: Bun, Steinke (2016), arXiv:1605.02065 (composition); Canonne, Kamath, Steinke (2020), arXiv:2004.00010,
theorem 4 (the discrete Gaussian has the rho of the continuous one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from assay.privacy.accounting import Adjacency, Cost, Unit, check_terms, exact
from assay.privacy.discrete import variance_of_gaussian, variance_of_laplace
from assay.privacy.noise import Integers, NoiseSource, Real, gaussian_variance, laplace_scale

Law = Literal["laplace", "gaussian"]
Arrays = dict[str, Integers]

# Shares of a budget are integers over this: they add up exactly, and the smallest part that is used stays positive.
_SHARES = 2**40


@dataclass(frozen=True, kw_only=True)
class Terms:
    """A budget: epsilon for Laplace noise, rho for Gaussian, about one unit under one adjacency."""

    law: Law
    amount: Fraction
    adjacency: Adjacency
    unit: Unit

    def __post_init__(self) -> None:
        check_terms(self.adjacency, self.unit)

    @classmethod
    def make(cls, law: Law, amount: Real, *, adjacency: Adjacency, unit: Unit) -> Terms:
        """Terms with an exact amount."""
        name = "epsilon" if law == "laplace" else "rho"
        return cls(law=law, amount=exact(amount, name), adjacency=adjacency, unit=unit)

    @property
    def cost(self) -> Cost:
        """What a ledger is charged."""
        make = Cost.pure if self.law == "laplace" else Cost.zcdp
        return make(self.amount, adjacency=self.adjacency, unit=self.unit)

    def for_one_record(self, factor: Fraction | int) -> Fraction:
        """What the coming or going of one record may lose, where a replacement loses up to `factor` times as much."""
        return self.amount / factor if self.adjacency == "replace" else self.amount


@dataclass(frozen=True)
class Block:
    """Columns start .. stop of one array, in all its rows, under one noise.

    Attributes
    ----------
    name
        The array.
    start, stop
        Columns.
    l1, squared
        How far one record more or less moves the block: sum of absolute changes, sum of squared changes.
    law
        "laplace" or "gaussian".
    noise
        Scale, or variance.
    """

    name: str
    start: int
    stop: int
    l1: int
    squared: int
    law: Law
    noise: Fraction

    @property
    def loss(self) -> Fraction:
        """Epsilon or rho of one record more or less."""
        return self.l1 / self.noise if self.law == "laplace" else self.squared / (2 * self.noise)

    @property
    def variance(self) -> float:
        """Variance of the noise on each integer."""
        return variance_of_laplace(self.noise) if self.law == "laplace" else variance_of_gaussian(self.noise)

    def loss_of(self, change: Integers) -> Fraction:
        """Epsilon or rho between two data sets whose exact integers in this block differ by `change`."""
        moved = [int(v) for v in np.ravel(change[:, self.start : self.stop]) if v]
        if self.law == "laplace":
            return sum((abs(v) for v in moved), 0) / self.noise
        return sum((v * v for v in moved), 0) / (2 * self.noise)


def block(
    name: str, columns: tuple[int, int], *, l1: int, squared: int, share: Fraction, law: Law, amount: Fraction
) -> Block:
    """A block that spends `share` of `amount`; its noise is rounded up."""
    budget = amount * share
    try:
        noise = laplace_scale(l1 / budget) if law == "laplace" else gaussian_variance(squared / (2 * budget))
    except ValueError as error:
        raise ValueError(
            f"the budget is too small, or the tree too deep, for noise that can be drawn: {error}"
        ) from None
    return Block(name, *columns, l1, squared, law, noise)


def split(errors: Sequence[float], law: Law) -> list[Fraction]:
    """Shares of a budget that minimise the variance of a sum of noises, adding up to at most 1.

    Noise i enters the answer with standard deviation errors[i] / epsilon_i or errors[i] / sqrt(rho_i). By Lagrange,
    epsilon_i ~ errors[i]^(2/3) gives (sum errors^(2/3))^(3/2) / epsilon, and rho_i ~ errors[i] gives
    sum errors / sqrt(rho).
    """
    weights = np.asarray(errors, dtype=np.float64) ** (2 / 3 if law == "laplace" else 1.0)
    parts = np.maximum(np.floor(weights / weights.sum() * (_SHARES - len(weights))), 1)
    return [Fraction(int(part), _SHARES) for part in parts]


def even(parts: int) -> list[Fraction]:
    """Equal shares."""
    return [Fraction(1, parts)] * parts


def total_loss(blocks: Sequence[Block]) -> Fraction:
    """Epsilon or rho of one record more or less, over all blocks."""
    return sum((one.loss for one in blocks), Fraction(0))


def loss_between(blocks: Sequence[Block], first: Mapping[str, Integers], second: Mapping[str, Integers]) -> Fraction:
    """Epsilon or rho between two data sets with these exact integers: what a self-audit compares with the cost."""
    covered = {name: np.zeros(values.shape[1], dtype=bool) for name, values in first.items()}
    for one in blocks:
        covered[one.name][one.start : one.stop] = True
    if not all(columns.all() for columns in covered.values()):
        raise ValueError("arrays hold columns that no block covers: they would be released without noise.")
    changes = {name: first[name] - second[name] for name in first}
    return sum((one.loss_of(changes[one.name]) for one in blocks), Fraction(0))


def add_noise(arrays: Arrays, blocks: Sequence[Block], noise: NoiseSource) -> None:
    """Add each block's noise, in place."""
    for one in blocks:
        held = arrays[one.name]
        shape = (held.shape[0], one.stop - one.start)
        drawn = noise.laplace(one.noise, shape) if one.law == "laplace" else noise.gaussian(one.noise, shape)
        held[:, one.start : one.stop] += drawn


def n_draws(arrays: Arrays) -> int:
    """How many integers get noise."""
    return sum(math.prod(values.shape) for values in arrays.values())
