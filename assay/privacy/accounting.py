"""What releases cost together: pure, zCDP and PLD accounts, conversions between them, an odometer.

Guarantee: pure and zCDP totals are exact rationals and hold under fully adaptive composition, where each release may
depend on the answers before it; PLD totals are upper bounds, for costs that were fixed in advance. Conversions are in
doubles, with margins on the safe side.
References: Bun, Steinke (2016), arXiv:1605.02065, propositions 1.3, 1.4, lemma 1.7; Canonne, Kamath, Steinke (2020),
arXiv:2004.00010, theorem 7, proposition 12; Whitehouse et al. (2023), arXiv:2203.05481 (adaptive zCDP);
Balle, Wang (2018), arXiv:1805.06530, theorem 8 (analytic Gaussian).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

from assay._errors import MissingDependencyError
from assay.privacy.noise import Real, float_above, gaussian_variance

Adjacency = Literal["add-remove", "replace"]
Unit = Literal["event", "document", "author"]
Accountant = Literal["pure", "zcdp", "pld"]
Kind = Literal["pure", "zcdp", "laplace", "gaussian"]

# The PLD of a discrete Gaussian is a table of about forty standard deviations each way.
_MAX_PLD_SIGMA = 1e5
# What doubles may lose in a conversion, on the safe side.
_ROUNDING = 1e-11


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The privacy loss of one release, or of `count` alike ones. Make it with `pure`, `zcdp`, `laplace`, `gaussian`.

    Attributes
    ----------
    kind
        "pure": epsilon alone is known; "zcdp": rho alone; "laplace" and "gaussian": the noise is known, and with it the
        whole law of the loss.
    amount
        Epsilon, rho, scale of the noise, or variance of the noise.
    sensitivity
        How far one unit moves the noised integer; 0 for "pure" and "zcdp".
    count
        How many such releases.
    adjacency
        "add-remove": one unit more or less; "replace": one unit changed into another.
    unit
        Whose data one unit is: one event, one document, all documents of an author.
    """

    kind: Kind
    amount: Fraction
    adjacency: Adjacency
    unit: Unit
    sensitivity: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}.")
        check_terms(self.adjacency, self.unit)
        if not isinstance(self.amount, Fraction) or self.amount <= 0:
            raise ValueError(f"amount must be a positive Fraction, got {self.amount!r}.")
        lowest = 1 if self.kind in ("laplace", "gaussian") else 0
        if type(self.sensitivity) is not int or self.sensitivity < lowest:
            raise ValueError(f"sensitivity must be an integer of at least {lowest}, got {self.sensitivity!r}.")
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"count must be a positive integer, got {self.count!r}.")

    @classmethod
    def pure(cls, epsilon: Real, *, adjacency: Adjacency, unit: Unit) -> Cost:
        """A mechanism that is epsilon-differentially private."""
        return cls(kind="pure", amount=exact(epsilon, "epsilon"), adjacency=adjacency, unit=unit)

    @classmethod
    def zcdp(cls, rho: Real, *, adjacency: Adjacency, unit: Unit) -> Cost:
        """A mechanism that is rho-zero-concentrated differentially private."""
        return cls(kind="zcdp", amount=exact(rho, "rho"), adjacency=adjacency, unit=unit)

    @classmethod
    def laplace(cls, scale: Fraction, *, sensitivity: int = 1, adjacency: Adjacency, unit: Unit) -> Cost:
        """One integer with discrete Laplace noise."""
        amount = exact(scale, "scale")
        return cls(kind="laplace", amount=amount, sensitivity=sensitivity, adjacency=adjacency, unit=unit)

    @classmethod
    def gaussian(cls, variance: Fraction, *, sensitivity: int = 1, adjacency: Adjacency, unit: Unit) -> Cost:
        """One integer with discrete Gaussian noise."""
        amount = exact(variance, "variance")
        return cls(kind="gaussian", amount=amount, sensitivity=sensitivity, adjacency=adjacency, unit=unit)

    @property
    def epsilon(self) -> Fraction | None:
        """Pure epsilon of all `count` releases, or None where no finite one holds."""
        if self.kind == "pure":
            return self.amount * self.count
        return self.sensitivity / self.amount * self.count if self.kind == "laplace" else None

    @property
    def rho(self) -> Fraction:
        """The zCDP of all `count` releases; epsilon-DP is epsilon**2 / 2 of it (Bun and Steinke, proposition 1.4)."""
        if self.kind == "zcdp":
            return self.amount * self.count
        if self.kind == "gaussian":
            return Fraction(self.sensitivity**2) / (2 * self.amount) * self.count
        one = self.amount if self.kind == "pure" else self.sensitivity / self.amount
        return one**2 / 2 * self.count

    def times(self, count: int) -> Cost:
        """The cost of `count` such releases."""
        return replace(self, count=self.count * count)

    def for_group(self, size: int, unit: Unit) -> Cost:
        """The cost for a unit that owns up to `size` of these units: epsilon times size, rho times size squared.

        Parameters
        ----------
        size
            Bound on what one larger unit contributes, at least 1; it must be enforced, not hoped for.
        unit
            The larger unit.
        """
        if type(size) is not int or size < 1:
            raise ValueError(f"size must be a positive integer, got {size!r}.")
        if self.kind in ("laplace", "gaussian"):
            return replace(self, sensitivity=self.sensitivity * size, unit=unit)
        return replace(self, amount=self.amount * (size if self.kind == "pure" else size**2), unit=unit)


class Odometer:
    """A running total of costs of one adjacency and unit, read without changing it.

    Pure and zCDP totals hold when each release, and its cost, is chosen after seeing the ones before it, so long as
    the budget at which one stops is fixed in advance (the ledger's is). For PLD the costs must be fixed in advance.
    """

    def __init__(self, *, adjacency: Adjacency, unit: Unit) -> None:
        check_terms(adjacency, unit)
        self._adjacency: Adjacency = adjacency
        self._unit: Unit = unit
        self._costs: list[Cost] = []

    @property
    def costs(self) -> tuple[Cost, ...]:
        """Everything added so far."""
        return tuple(self._costs)

    def add(self, *costs: Cost) -> None:
        """Count releases that were made.

        Raises
        ------
        ValueError
            If a cost is for another adjacency or unit.
        """
        for cost in costs:
            check_same_terms(cost, self._adjacency, self._unit)
        self._costs += costs

    def epsilon(self) -> Fraction:
        """Pure total. Raises ValueError where a release has none."""
        return pure_total(self._costs)

    def rho(self) -> Fraction:
        """The zCDP total."""
        return zcdp_total(self._costs)

    def epsilon_at(self, delta: float, *, accountant: Literal["zcdp", "pld"] = "zcdp") -> float:
        """The epsilon of (epsilon, delta)-DP of everything so far."""
        if accountant == "pld":
            return pld_epsilon(self._costs, delta)
        return epsilon_of_rho(self.rho(), delta, sharp=True) if self._costs else 0.0


def pure_total(costs: Iterable[Cost]) -> Fraction:
    """Sum of pure epsilons, which bounds the epsilon of all of them together (basic composition).

    Parameters
    ----------
    costs
        Of mechanisms that may each look at the answers before it; none costs 0.

    Returns
    -------
    Exact, at least 0.

    Raises
    ------
    ValueError
        If one of the costs is Gaussian or zCDP, for which no finite pure epsilon holds.
    """
    total = Fraction(0)
    for cost in costs:
        if cost.epsilon is None:
            raise ValueError(f"costs must be pure or laplace for a pure account, got {cost.kind}. Use zcdp or pld.")
        total += cost.epsilon
    return total


def zcdp_total(costs: Iterable[Cost]) -> Fraction:
    """Sum of rhos."""
    return sum((cost.rho for cost in costs), Fraction(0))


def pld_epsilon(costs: Sequence[Cost], delta: float) -> float:
    """Epsilon at `delta` of all costs together by privacy loss distributions; an upper bound, rounded pessimistically.

    Needs the extra `privacy` (dp-accounting). The costs must have been fixed in advance.

    Raises
    ------
    MissingDependencyError
        If dp-accounting is not installed.
    ValueError
        For a cost of kind "zcdp", of which no loss distribution is known, or noise too wide for its table.
    """
    _check_delta(delta)
    if not costs:
        return 0.0
    if importlib.util.find_spec("dp_accounting") is None:
        raise MissingDependencyError("a PLD account needs dp-accounting: pip install 'assay[privacy]'. Or use zcdp.")
    grouped: dict[Cost, int] = {}
    for cost in costs:
        one = replace(cost, count=1)
        grouped[one] = grouped.get(one, 0) + cost.count
    whole: Any = None
    for cost, count in grouped.items():
        part = _pld_of(cost).self_compose(count)
        whole = part if whole is None else whole.compose(part)
    return float(whole.get_epsilon_for_delta(delta))


def epsilon_of_rho(rho: Real, delta: float, *, sharp: bool = False) -> float:
    """Epsilon at `delta` of rho-zCDP.

    Parameters
    ----------
    rho, delta
        What is given.
    sharp
        False: rho + 2 sqrt(rho ln(1/delta)) (Bun and Steinke, proposition 1.3). True: the smallest epsilon whose
        `delta_of_rho` is at most `delta`, about a tenth less.
    """
    _check_delta(delta)
    value = float_above(exact(rho, "rho"))
    plain = (value + 2 * math.sqrt(value * -math.log(delta))) * (1 + 2**-50)
    if not sharp or delta_of_rho(value, plain) > delta:
        return plain
    low, high = 0.0, plain
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of_rho(value, middle) <= delta else (middle, high)
    return high


def delta_of_rho(rho: Real, epsilon: float) -> float:
    """Smallest delta that Renyi orders prove for rho-zCDP at `epsilon`; tighter than `epsilon_of_rho`.

    min over a > 1 of exp((a - 1)(a rho - epsilon)) / (a - 1) (1 - 1/a)^a (Canonne et al., proposition 12).
    """
    from scipy.optimize import minimize_scalar

    value = float_above(exact(rho, "rho"))
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be a finite number of at least 0, got {epsilon}.")

    def log_delta(log_order: float) -> float:
        a = 1 + math.exp(log_order)
        return (a - 1) * (a * value - epsilon) - math.log(a - 1) + a * math.log1p(-1 / a)

    # Every order gives a valid delta, so an imperfect minimum is still a bound.
    found = minimize_scalar(log_delta, bounds=(-12.0, 25.0), method="bounded", options={"xatol": 1e-10})
    return min(1.0, math.exp(min(0.0, found.fun)) * (1 + _ROUNDING))


def rho_for(epsilon: Real, delta: float, *, sharp: bool = False) -> Fraction:
    """The largest rho that gives `epsilon` at `delta`, rounded down.

    Parameters
    ----------
    epsilon, delta
        The target.
    sharp
        False inverts `epsilon_of_rho`: (sqrt(l + epsilon) - sqrt(l))^2 with l = ln(1/delta). True inverts the sharper
        `delta_of_rho`, which is worth a sixth to a quarter of the noise variance.
    """
    _check_delta(delta)
    target = -float_above(-exact(epsilon, "epsilon"))  # the largest double that is not above it
    log = -math.log(delta)
    # The difference of two roots, written as a quotient so that small epsilons keep their digits.
    rho = (target / (math.sqrt(log + target) + math.sqrt(log))) ** 2
    if rho == 0:
        raise ValueError(f"epsilon must be at least 1e-150, got {float(epsilon):.3g}: its rho is below every double.")
    while epsilon_of_rho(rho, delta) > target:
        rho = math.nextafter(rho, 0.0)
    if not sharp:
        return Fraction(rho)
    low, high = rho, 4 * rho + target  # the plain bound holds; rho >= epsilon never does
    if delta_of_rho(low, target) > delta:
        return Fraction(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of_rho(middle, target) <= delta else (low, middle)
    return Fraction(low)


def single_gaussian_variance(epsilon: float, delta: float, *, sensitivity: int = 1) -> Fraction:
    """Variance for one integer released once with (epsilon, delta)-DP; about a fifth less noise than through zCDP.

    Guarantee: the exact discrete law has at most `delta` at `epsilon` (`delta_of_gaussian`). For what is released once
    and never composed; a ledger wants zCDP.

    Parameters
    ----------
    epsilon, delta
        Positive; delta below 1.
    sensitivity
        Positive integer: how far one unit moves the number.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    _check_delta(delta)
    target = float(exact(epsilon, "epsilon"))

    def excess(log_sigma: float) -> float:
        # Theorem 8 of Balle and Wang for the continuous law; the discrete one is checked below.
        sigma = math.exp(log_sigma)
        a, b = 0.5 / sigma, target * sigma
        log_first, log_second = float(log_ndtr(a - b)), target + float(log_ndtr(-a - b))
        return log_first + math.log(-math.expm1(min(log_second - log_first, -1e-300))) - math.log(delta)

    sigma = sensitivity * math.exp(brentq(excess, -6.0, 25.0, xtol=1e-12))
    variance = gaussian_variance(sigma * sigma)
    while delta_of_gaussian(variance, target, sensitivity=sensitivity) > delta:
        variance = gaussian_variance(variance * Fraction(1001, 1000))
    return variance


def delta_of_gaussian(variance: Fraction, epsilon: float, *, sensitivity: int = 1) -> float:
    """The delta at `epsilon` of one integer with discrete Gaussian noise (Canonne et al., theorem 7).

    Never below the exact one, and above it by less than two parts in 10**6 (10**10 up to a variance of 10**10).

    Notes
    -----
    P(Y > t - s/2) - e^epsilon P(Y > t + s/2) with t = epsilon variance / s, written as the sum over y > t - s/2 of
    P(y) (1 - exp(epsilon - s (2y + s) / (2 variance))): no term is negative, so no digits cancel.
    """
    import numpy as np

    from assay.privacy.discrete import log_pmf_gaussian

    v = float(exact(variance, "variance"))
    if v > _MAX_PLD_SIGMA**2:
        return _delta_of_wide_gaussian(math.sqrt(v), epsilon, sensitivity)
    reach = math.ceil(40 * math.sqrt(v)) + sensitivity + 2
    y = np.arange(math.floor(epsilon * v / sensitivity - sensitivity / 2), reach + 1, dtype=np.float64)
    gain = -np.expm1(np.minimum(0.0, epsilon - sensitivity * (2 * y + sensitivity) / (2 * v)))
    return min(1.0, float(np.exp(log_pmf_gaussian(y, v)) @ gain) * (1 + _ROUNDING))


def _delta_of_wide_gaussian(sigma: float, epsilon: float, sensitivity: int) -> float:
    """The same where a table of all integers would be too long: the sum as an integral.

    The two differ by less than (epsilon / sensitivity)^2 of it, which is below 10**-6 wherever delta is not zero.
    """
    from scipy.integrate import quad

    ratio = sensitivity / sigma
    start = epsilon / ratio - ratio / 2  # in standard deviations, as all that follows
    top = max(start, 0.0)
    if top > 38.0:
        return 0.0  # below 1e-313

    def height(z: float) -> float:
        return -math.exp(-(z - top) * (z + top) / 2) * math.expm1(-ratio * (z - start))

    low, high = max(start, -40.0), top + 40.0
    bend = top + 5 / (1 + top)
    area = sum(quad(height, *ends, epsabs=0.0, epsrel=1e-9, limit=200)[0] for ends in ((low, bend), (bend, high)))
    density = math.exp(-top * top / 2) / math.sqrt(2 * math.pi)
    return min(1.0, density * float(area) * (1 + 1e-6))


def exact(value: Real, argument: str) -> Fraction:
    """A positive finite number as the rational it is: 0.1 is 3602879701896397 / 2**55, Fraction(1, 10) is a tenth."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise TypeError(f"{argument} must be an integer, a float or a Fraction, got {type(value).__name__}.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{argument} must be positive and finite, got {value}.")
    return Fraction(value)


def check_terms(adjacency: str, unit: str) -> None:
    """Raise ValueError unless both are known words."""
    if adjacency not in get_args(Adjacency):
        raise ValueError(f"adjacency must be one of {get_args(Adjacency)}, got {adjacency!r}.")
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {get_args(Unit)}, got {unit!r}.")


def check_same_terms(cost: Cost, adjacency: str, unit: str) -> None:
    """Raise ValueError unless the cost is for this adjacency and unit; nothing is converted behind one's back."""
    if (cost.adjacency, cost.unit) != (adjacency, unit):
        raise ValueError(
            f"cost must be for {adjacency} of one {unit}, got one for {cost.adjacency} of one {cost.unit}. "
            "A bound on what a larger unit contributes gives its cost: Cost.for_group."
        )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}.")


def _pld_of(cost: Cost) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld
    from dp_accounting.pld.common import DifferentialPrivacyParameters

    if cost.kind == "zcdp":
        raise ValueError("a cost known only as zCDP has no loss distribution. Use accountant='zcdp'.")
    if cost.kind == "pure":
        return pld.from_privacy_parameters(DifferentialPrivacyParameters(float(cost.amount) * (1 + 2**-50), 0.0))
    if cost.kind == "laplace":
        return pld.from_discrete_laplace_mechanism(float(1 / cost.amount) * (1 + 2**-50), sensitivity=cost.sensitivity)
    sigma = math.sqrt(cost.amount) * (1 - 2**-50)
    if sigma > _MAX_PLD_SIGMA:
        raise ValueError(f"variance must be at most 1e10 for a PLD account, got {float(cost.amount):.3g}. Use zcdp.")
    return pld.from_discrete_gaussian_mechanism(sigma, sensitivity=cost.sensitivity)
