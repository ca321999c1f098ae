"""Plans of counters: which mechanism, how much noise, what it costs, how far off a release will be.

Guarantee of a planned counter, against a stream that may be chosen after seeing earlier releases: epsilon-DP (Laplace)
or rho-zCDP (Gaussian), for one unit that changes at most `contributions` steps, any two of them at least `separation`
apart, by at most `bound` each. A unit keeps its steps: left out, they become 0; replaced, they take other values in
0 .. bound; so the two are the same here.
Gaussian Toeplitz and BLT counters round a sum of doubles: they are rho-zCDP up to a total variation of
`numerical_delta`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Adjacency, Cost, Unit, check_terms, exact, rho_for
from assay.privacy.continual.toeplitz import (
    LARGEST_FIT,
    Banded,
    BufferedLinear,
    SquareRoot,
    blt_noise,
    fit_banded,
    fit_blt,
)
from assay.privacy.continual.trees import (
    BinaryTree,
    Factorisation,
    Floats,
    Honaker,
    KaryTree,
    Plain,
    SmoothTree,
    best_arity,
    check_horizon,
    mean_and_max_rows,
)
from assay.privacy.discrete import variance_of_gaussian, variance_of_laplace
from assay.privacy.noise import Real, gaussian_variance, laplace_scale

Law = Literal["laplace", "gaussian"]
MECHANISMS = ("plain", "binary tree", "Honaker", "k-ary tree", "smooth tree", "square root", "BLT", "banded")

_FFT_LARGEST = 2**22
# Of the floats in which noise is mixed.
_ROUNDOFF = max(float(np.finfo(np.longdouble).eps) / 2, 2.0**-65)
# What rounding may add to delta: a part of it, or this where none is named.
_NUMERICAL_SHARE, _NUMERICAL = 0.25, 1e-3
_BUFFERS = (1, 2, 3, 5)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a counter will do. Made by `plan_counter`.

    Attributes
    ----------
    design
        The factorisation.
    law
        Law of the node noise.
    node
        Scale (Laplace) or variance (Gaussian) of one node's integer noise; for Toeplitz designs on a grid of
        2**-`grid_bits`.
    grid_bits
        0 for trees, whose noise is on the integers.
    cost
        What the whole counter costs, however long it runs.
    bound
        Largest value of one step; steps are integers in 0 .. bound.
    contributions
        How many steps one unit may change.
    columns
        Counters that run side by side under this one cost.
    touched
        How many of the columns one step of one unit may change.
    separation
        How many steps lie at least from one contribution of a unit to its next; 1 for no promise.
    """

    design: Factorisation
    law: Law
    node: Fraction
    grid_bits: int
    cost: Cost
    bound: int = 1
    contributions: int = 1
    columns: int = 1
    touched: int = 1
    separation: int = 1

    @property
    def about(self) -> str:
        """Whom the guarantee is about, with what was promised of them, in words."""
        said = f"{self.cost.adjacency} of one {self.cost.unit}"
        if self.contributions > 1:
            said += f" with at most {self.contributions} contributions"
        return f"{said} at least {self.separation} steps apart" if self.separation > 1 else said

    @property
    def node_variance(self) -> float:
        """Exact variance of one node's noise, in steps squared."""
        raw = variance_of_laplace(self.node) if self.law == "laplace" else variance_of_gaussian(self.node)
        return raw / 4.0**self.grid_bits

    @property
    def rounding_variance(self) -> float:
        """What rounding to integers adds; nothing where the noise is on the integers."""
        return 0.0 if isinstance(self.design, BinaryTree | KaryTree | SmoothTree | Plain) else 1 / 12

    def standard_error(self, times: npt.ArrayLike) -> Floats:
        """Exact standard deviation of the releases at `times`, in 1 .. horizon (from rounding: within 1/12 of it)."""
        rows = self.design.rows(np.asarray(times, dtype=np.int64))
        found: Floats = np.sqrt(self.node_variance * rows + self.rounding_variance)
        return found

    @property
    def mean_and_max_variance(self) -> tuple[float, float]:
        """Mean and largest variance of a release over 1 .. horizon."""
        mean, worst = mean_and_max_rows(self.design)
        return self.node_variance * mean + self.rounding_variance, self.node_variance * worst + self.rounding_variance

    def band(self, beta: float = 0.05) -> float:
        """Half width that holds at times 1 .. horizon and all columns at once with probability 1 - beta.

        By a union bound and Chernoff's, hence on the safe side.
        """
        if not 0 < beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {beta}.")
        log = math.log(2 * self.design.horizon * self.columns / beta)
        rows = mean_and_max_rows(self.design)[1]
        # Rounding moves a release by a half at most.
        slack = 0.5 if self.rounding_variance else 0.0
        if self.law == "gaussian":
            return math.sqrt(2 * log * rows * float(self.node)) / 2.0**self.grid_bits + slack
        scale = float(self.node)
        # A sum of weighted Laplace draws with weights at most 1 has log-mgf at most -rows log(1 - (u scale)^2).
        u = np.linspace(1e-4, 1 - 1e-6, 20_001)
        return float(np.min((log - rows * np.log1p(-(u**2))) / u)) * scale + slack

    @property
    def numerical_delta(self) -> float:
        """How far the law of the releases may be, in total variation, from that of exact arithmetic; 0 for trees.

        A release differs only where the exact noise lies closer to a half-integer than the error of its evaluation:
        twice that error, per time and column, bounds the chance. The rounding of columns to the noise's grid is taken
        at its worst, that of floats in root mean square. For an endless plan it is for the first `horizon` steps.
        """
        if not self.grid_bits:
            return 0.0
        horizon = self.design.horizon
        sigma = math.sqrt(self.node_variance)
        if isinstance(self.design, BufferedLinear):
            # Each buffer rounds twice a step, and forgets at its rate: errors of a random walk.
            rates, weights = blt_noise(np.array(self.design.poles), np.array(self.design.zeros))
            with np.errstate(divide="ignore"):
                lengths = np.minimum(horizon, 1 / (1 - rates**2))
            floats = 8 * 2.0**-53 * sigma * float(np.abs(weights) @ lengths)
        else:
            # Convolution by FFT: relative rounding per stage, in root mean square over the stream.
            _, rows = mean_and_max_rows(self.design)
            stages = 8 * (math.log2(horizon) + 2)
            floats = _ROUNDOFF * stages * sigma * math.sqrt(rows * self.design.l2_squared)
        return 2 * horizon * self.columns * (2.0 ** -(self.grid_bits + 1) + floats)

    def __str__(self) -> str:
        mean, worst = self.mean_and_max_variance
        what = (
            f"{self.design.name} of arity {self.design.arity}"
            if isinstance(self.design, KaryTree)
            else self.design.name
        )
        if isinstance(self.design, BufferedLinear):
            what += f" with {len(self.design.poles)} buffers"
        if isinstance(self.design, Banded):
            what += f" with {self.design.bands} bands"
        price = (
            f"epsilon {float(self.cost.amount):.4g}"
            if self.cost.kind == "pure"
            else f"rho {float(self.cost.amount):.4g}"
        )
        return (
            f"{what}, {self.law} noise, {price} for {self.about}; "
            f"{self.columns} x {self.design.horizon} releases, standard error {math.sqrt(mean):.3g} on average "
            f"and at most {math.sqrt(worst):.3g}, all within {self.band():.3g} with probability 0.95"
        )


def plan_counter(
    horizon: int,
    *,
    epsilon: Real | None = None,
    delta: float = 0.0,
    rho: Real | None = None,
    adjacency: Adjacency,
    unit: Unit,
    memory: int | None = None,
    mechanism: str | None = None,
    bound: int = 1,
    contributions: int = 1,
    columns: int = 1,
    touched: int | None = None,
    separation: int = 1,
    bands: int | None = None,
    arity: int | None = None,
) -> Plan:
    """Choose the counter with the smallest largest error that the privacy and the memory allow.

    Parameters
    ----------
    horizon
        T in [1, 2**40]: releases at times 1 .. T. For no horizon see `plan_endless`.
    epsilon, delta
        With delta 0: Laplace noise only. With delta above 0: Gaussian noise too, by the sharpest zCDP conversion.
    rho
        Instead of epsilon and delta.
    adjacency, unit
        What the guarantee is about; see `Cost`.
    memory
        Most numbers that the running counter may keep per column; None for no limit.
    mechanism
        One of `MECHANISMS` to decide for it. The k-ary tree takes Laplace noise only: epsilon, not rho. Undecided, one
        whose `numerical_delta` exceeds a quarter of delta, or 10^-3 where there is no delta, is not taken.
    bound
        Largest step.
    contributions
        How many steps one unit may change, at least 1.
    columns
        Counters side by side.
    touched
        How many columns one step of one unit may change; default all. A histogram touches one under add/remove and two
        under replace.
    separation
        Least number of steps from one contribution of a unit to its next, such as 30 if each user counts once in 30
        days; 1 promises nothing. Banded noise with so many bands pays for k contributions k times, not k^2 times.
    bands
        For "banded": its width; default `separation`. A wider band pays k^2 times.
    arity
        For "k-ary tree": its arity instead of the best one.

    Raises
    ------
    ValueError
        If an argument is out of range, or no mechanism fits the memory.
    """
    check_horizon(horizon)
    check_terms(adjacency, unit)
    whole = (("bound", bound), ("contributions", contributions), ("columns", columns), ("separation", separation))
    for name, value in whole:
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    touched = columns if touched is None else touched
    if type(touched) is not int or not 1 <= touched <= columns:
        raise ValueError(f"touched must be an integer in [1, {columns}], got {touched!r}.")
    if mechanism is not None and mechanism not in MECHANISMS:
        raise ValueError(f"mechanism must be one of {MECHANISMS}, got {mechanism!r}.")
    if memory is not None and (type(memory) is not int or memory < 1):
        raise ValueError(f"memory must be a positive integer or None, got {memory!r}.")
    pure, zcdp = targets(epsilon, delta, rho)
    terms: dict[str, Any] = {"adjacency": adjacency, "unit": unit}
    sizes = {
        "bound": bound,
        "contributions": contributions,
        "columns": columns,
        "touched": touched,
        "separation": separation,
    }
    if bands is None and separation > 1:
        bands = min(separation, horizon)
    comes_back = contributions > 1 and separation > 1
    plans = []
    for design in _candidates(horizon, memory, mechanism, bands, arity, gaussian=zcdp is not None, banded=comes_back):
        if pure is not None and design.l1 is not None:
            plans.append(_laplace(design, pure, terms, sizes))
        # The proof for Gaussian noise needs nodes that are not read before they are complete; these are.
        if zcdp is not None and not isinstance(design, KaryTree):
            plan = _gaussian(design, zcdp, terms, sizes)
            if mechanism is not None or plan.numerical_delta <= (_NUMERICAL_SHARE * delta or _NUMERICAL):
                plans.append(plan)
    if not plans:
        raise ValueError(
            f"no mechanism fits memory={memory}, mechanism={mechanism!r} and this privacy. "
            "Allow more memory, or delta above 0 for Gaussian mechanisms."
        )
    return min(plans, key=lambda plan: plan.mean_and_max_variance[::-1])


def plan_endless(
    around: int,
    *,
    rho: Real,
    adjacency: Adjacency,
    unit: Unit,
    buffers: int = 5,
    bound: int = 1,
    contributions: int = 1,
) -> Plan:
    """A Gaussian counter without a horizon: a BLT whose sensitivity is that of an endless stream.

    Guarantee: rho-zCDP however long it runs, because every pole is below one and the columns of C have a finite norm.
    The error is near the best around the time it was fitted for and grows like the root of the time far beyond.

    Parameters
    ----------
    around
        The time at which the error is made small; public.
    buffers
        In [1, 10].
    rho, adjacency, unit, bound, contributions
        As for `plan_counter`.

    Returns
    -------
    Plan, for `EndlessCounter`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Dvijotham et al. (2024), arXiv:2404.16706, for buffered linear Toeplitz (BLT) noise.
    """
    check_terms(adjacency, unit)
    sizes = {"bound": bound, "contributions": contributions, "columns": 1, "touched": 1, "separation": 1}
    design = fit_blt(around, buffers, unbounded=True)
    return _gaussian(design, exact(rho, "rho"), {"adjacency": adjacency, "unit": unit}, sizes)


def targets(epsilon: Real | None, delta: float, rho: Real | None) -> tuple[Fraction | None, Fraction | None]:
    """Pure epsilon for Laplace candidates and rho for Gaussian ones; None where there are none."""
    if (epsilon is None) == (rho is None):
        raise ValueError("give either epsilon (with delta) or rho.")
    if rho is not None:
        if delta:
            raise ValueError("delta goes with epsilon; rho needs none.")
        return None, exact(rho, "rho")
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}.")
    assert epsilon is not None  # noqa: S101  # for the type checker
    return exact(epsilon, "epsilon"), rho_for(epsilon, delta, sharp=True) if delta else None


def _candidates(
    horizon: int,
    memory: int | None,
    mechanism: str | None,
    bands: int | None,
    arity: int | None,
    *,
    gaussian: bool,
    banded: bool,
) -> list[Factorisation]:
    found: list[Factorisation] = []
    wanted = [mechanism] if mechanism else ["binary tree", "Honaker", "k-ary tree", "smooth tree"]
    if gaussian and mechanism is None:
        wanted += ["square root"] if horizon <= _FFT_LARGEST else []
        wanted += ["banded"] if horizon <= _FFT_LARGEST and banded else []
        wanted += ["BLT"] if memory is not None or horizon > _FFT_LARGEST else []
    for name in wanted:
        if name == "banded":
            if bands is None:
                raise ValueError("bands must be given for the banded mechanism, or separation.")
            fits = type(bands) is int and horizon * bands <= LARGEST_FIT
            found.append(fit_banded(horizon, bands) if fits else Banded(horizon, bands))
        elif name == "BLT":
            counts = [d for d in _BUFFERS if memory is None or d + 1 <= memory]
            found += [fit_blt(horizon, d) for d in counts[-1:]]
        elif name == "k-ary tree":
            found.append(KaryTree(horizon, best_arity(horizon) if arity is None else arity))
        else:
            found.append(_SIMPLE[name](horizon))
    return [design for design in found if memory is None or design.memory <= memory]


_SIMPLE: dict[str, Any] = {
    "plain": Plain,
    "binary tree": BinaryTree,
    "Honaker": Honaker,
    "smooth tree": SmoothTree,
    "square root": SquareRoot,
}


def _laplace(design: Factorisation, epsilon: Fraction, terms: dict[str, Any], sizes: dict[str, int]) -> Plan:
    assert design.l1 is not None  # noqa: S101  # for the type checker
    reach = design.l1 * sizes["touched"] * sizes["contributions"] * sizes["bound"]
    node = laplace_scale(reach / epsilon)
    return Plan(design=design, law="laplace", node=node, grid_bits=0, cost=Cost.pure(epsilon, **terms), **sizes)


def _gaussian(design: Factorisation, rho: Fraction, terms: dict[str, Any], sizes: dict[str, int]) -> Plan:
    reach = sizes["touched"] * (sizes["contributions"] * sizes["bound"]) ** 2
    if isinstance(design, Banded) and design.bands <= sizes["separation"]:
        # No two contributions move the same row of C x: their squares add up.
        reach = sizes["touched"] * sizes["contributions"] * sizes["bound"] ** 2
    cost = Cost.zcdp(rho, **terms)
    if design.l1 is not None:
        node = gaussian_variance(design.l1 * reach / (2 * rho))
        return Plan(design=design, law="gaussian", node=node, grid_bits=0, cost=cost, **sizes)
    # Columns of C are not integers: noise lives on a fine grid, to which a column is rounded so that L times it is off
    # by half a step at most. The first factor covers how much longer that makes it (a column is at least as long as its
    # first entry), the second the sum of squares in doubles.
    sigma = math.sqrt(design.l2_squared * reach / (2 * float(rho)))
    bits = max(1, min(48, 49 - math.ceil(math.log2(sigma + 1))))
    horizon = 2**40 if getattr(design, "unbounded", False) else design.horizon
    away = math.sqrt(horizon) * design.variation * 2.0 ** -(bits + 1)  # type: ignore[attr-defined]  # all of these have
    slack = Fraction((1 + away) ** 2) * (1 + Fraction(1, 2**30))
    variance = Fraction(design.l2_squared) * slack * reach / (2 * rho)
    return Plan(
        design=design, law="gaussian", node=gaussian_variance(variance * 4**bits), grid_bits=bits, cost=cost, **sizes
    )
