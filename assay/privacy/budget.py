"""Budgets: what may be spent in total, about whom, and how it is counted; and the price of a batch.

Guarantee: limits and totals are exact rationals, so that no spend is lost to rounding; the epsilon of a PLD budget is
an upper bound in double precision, compared exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from assay.privacy.accounting import (
    Accountant,
    Adjacency,
    Cost,
    Unit,
    check_terms,
    exact,
    pld_epsilon,
    pure_total,
    rho_for,
    zcdp_total,
)
from assay.privacy.errors import BudgetError
from assay.privacy.noise import Real


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent, about whom, and how it is counted. Make it with `pure`, `zcdp`, `approximate` or `pld`.

    Attributes
    ----------
    accountant
        "pure" counts epsilon, "zcdp" counts rho, "pld" the epsilon at `delta` of the composed loss distributions.
    limit
        Total epsilon, rho, or epsilon at `delta`; exact.
    delta
        Zero for "pure". For "zcdp" the delta at which epsilons are quoted, 0 if none was named.
    adjacency, unit
        See `Cost`.
    """

    accountant: Accountant
    limit: Fraction
    delta: float = 0.0
    adjacency: Adjacency
    unit: Unit

    def __post_init__(self) -> None:
        if self.accountant not in get_args(Accountant):
            raise ValueError(f"accountant must be one of {get_args(Accountant)}, got {self.accountant!r}.")
        check_terms(self.adjacency, self.unit)
        if not isinstance(self.limit, Fraction) or self.limit <= 0:
            raise ValueError(f"limit must be a positive Fraction, got {self.limit!r}.")
        if not 0 <= self.delta < 1 or (self.accountant == "pld") > (self.delta > 0):
            raise ValueError(f"delta must be in (0, 1) for 'pld' and in [0, 1) otherwise, got {self.delta}.")
        if self.accountant == "pure" and self.delta:
            raise ValueError(f"delta must be 0 for a pure budget, got {self.delta}. Use Budget.approximate().")

    @classmethod
    def pure(cls, epsilon: Real, *, adjacency: Adjacency, unit: Unit) -> Budget:
        """Epsilon-DP in total."""
        return cls(accountant="pure", limit=exact(epsilon, "epsilon"), adjacency=adjacency, unit=unit)

    @classmethod
    def zcdp(cls, rho: Real, *, adjacency: Adjacency, unit: Unit) -> Budget:
        """Rho-zCDP in total."""
        return cls(accountant="zcdp", limit=exact(rho, "rho"), adjacency=adjacency, unit=unit)

    @classmethod
    def approximate(cls, epsilon: Real, delta: float, *, adjacency: Adjacency, unit: Unit) -> Budget:
        """(Epsilon, delta)-DP in total, counted as zCDP; holds under adaptive composition."""
        rho = rho_for(epsilon, delta, sharp=True)
        return cls(accountant="zcdp", limit=rho, delta=delta, adjacency=adjacency, unit=unit)

    @classmethod
    def pld(cls, epsilon: Real, delta: float, *, adjacency: Adjacency, unit: Unit) -> Budget:
        """(Epsilon, delta)-DP in total, counted by loss distributions: for costs that are fixed in advance."""
        return cls(accountant="pld", limit=exact(epsilon, "epsilon"), delta=delta, adjacency=adjacency, unit=unit)

    def spent(self, costs: Iterable[Cost]) -> Fraction:
        """What these costs use up, in the unit of `limit`.

        Raises
        ------
        BudgetError
            If loss distributions, which leave out a little mass, prove no finite epsilon at `delta`.
        """
        listed = list(costs)
        if self.accountant == "pure":
            return pure_total(listed)
        if self.accountant == "zcdp":
            return zcdp_total(listed)
        found = pld_epsilon(listed, self.delta)
        if math.isinf(found):
            raise BudgetError(
                f"delta {self.delta:g} is too small for a PLD account of these costs: no finite epsilon is proved. "
                "Nothing was spent. Release less, or use Budget.zcdp or Budget.approximate."
            )
        return Fraction(found)


@dataclass(frozen=True)
class Quote:
    """What a batch would cost, in the unit of the budget's limit.

    Attributes
    ----------
    cost
        What the batch adds to the total.
    spent
        The total before it.
    remaining
        What would be left after it; negative if it does not fit.
    affordable
        Whether it fits.
    epsilon_after
        Epsilon at the budget's delta after it; None for a zCDP budget without a delta.
    """

    cost: Fraction
    spent: Fraction
    remaining: Fraction
    affordable: bool
    epsilon_after: float | None

    def __str__(self) -> str:
        fits = "fits" if self.affordable else "does not fit"
        return f"costs {float(self.cost):.6g}, spent {float(self.spent):.6g}, {float(self.remaining):.6g} left: {fits}"
