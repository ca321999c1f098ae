"""The one interface of all private kernel sums: plan, fit, query, standard error, save, load.

Guarantee: what a fitted object holds, answers, prints, pickles and saves is epsilon-DP or rho-zCDP as its plan says,
for any number of queries by anybody: after `fit` the records are not used again. Only `clamping_` is private; it stays
out of files, pickles and printed objects.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from assay.privacy.accounting import Cost, rho_for
from assay.privacy.kde import storage
from assay.privacy.kde.blocks import Arrays, Block, Law, Terms, add_noise, n_draws, total_loss
from assay.privacy.kde.frame import Clamping, Floats
from assay.privacy.ledger import Ledger
from assay.privacy.noise import NoiseSource, Real, SeededDraws, noise_source, refuse_seeded

# OpenDP draws a vector twenty to thirty times slower than the compiled sampler, which draws these exactly too.
_BULK = 10_000


class Design(Protocol):
    """A construction with its sizes fixed: public, and all that is needed to read the released integers."""

    @property
    def name(self) -> str:
        """Of the construction."""

    def blocks(self, law: Law, amount: Any) -> tuple[Block, ...]:
        """The parts and their noise, where one record more or less may lose `amount`."""

    def factor(self, law: Law) -> Any:
        """How many times as much a replacement loses."""

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the released arrays."""

    def prepare(self, arrays: Arrays, frame: Any) -> tuple[Floats, ...]:
        """What answers are read from."""

    def answers(self, prepared: tuple[Floats, ...], points: Floats) -> Floats:
        """One answer for each point."""

    def variance(self, blocks: tuple[Block, ...], frame: Any, points: Floats) -> Floats:
        """Of the noise in each answer."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What will be released and what it costs; made from public settings alone.

    Attributes
    ----------
    design
        The construction and its sizes.
    terms
        Law of the noise, budget, adjacency, unit.
    blocks
        The parts, each with its sensitivity and noise.
    noise_error
        Standard deviation of the noise in an answer: root mean square over queries spread evenly between the bounds.
    approximation
        Bound on what the construction adds without any noise, about `n` records; see each class.
    """

    design: Any
    terms: Terms
    blocks: tuple[Block, ...] = field(repr=False)
    noise_error: float
    approximation: float

    def __post_init__(self) -> None:
        allowed = self.terms.for_one_record(self.design.factor(self.terms.law))
        if total_loss(self.blocks) > allowed:
            raise ValueError("blocks lose more than the terms allow; this is a defect of the construction.")

    @property
    def cost(self) -> Cost:
        """What the ledger is charged."""
        return self.terms.cost

    @property
    def error(self) -> float:
        """Root of noise_error^2 + approximation^2: what the public rule makes small."""
        return float(np.hypot(self.noise_error, self.approximation))

    def __str__(self) -> str:
        law = "epsilon" if self.terms.law == "laplace" else "rho"
        spent = f"{self.terms.law} noise, {law} {float(self.terms.amount):.4g}"
        about = f"{self.terms.adjacency} of one {self.terms.unit}"
        errors = f"standard error {self.noise_error:.4g}, approximation {self.approximation:.4g}"
        return f"{self.design.name}: {spent} for {about}; {errors}"


def plan_of(design: Design, terms: Terms, noise_error: Any, approximation: float) -> Plan:
    """A plan; `noise_error` is a function of the blocks."""
    blocks = design.blocks(terms.law, terms.for_one_record(design.factor(terms.law)))
    return Plan(design, terms, blocks, float(noise_error(blocks)), float(approximation))


class Release(BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn is untyped
    """Base of the private kernel sums. Subclasses give `_plan_for`, `_design_named`, `_integers` and `_queries`."""

    _DESIGNS: ClassVar[dict[str, Any]] = {}

    # Set by the constructors of subclasses.
    epsilon: Real | None
    delta: float
    rho: Real | None
    adjacency: Any
    unit: Any

    @abstractmethod
    def plan(self) -> Plan:
        """What `fit` would release and cost, by the public rule; no data, nothing spent.

        Raises
        ------
        ValueError
            If a setting is out of range.
        """

    def fit(self, points: npt.ArrayLike, *, noise: NoiseSource | None = None, ledger: Ledger | None = None) -> Self:
        """Release the records, once.

        Parameters
        ----------
        points
            Private records, shape (n, dims), or (n,) for one dimension; not NaN. Values outside the public bounds are
            moved to them, and how many were is in `clamping_`.
        noise
            Where noise comes from; default `noise_source()`, on the own exact sampler from 10,000 draws on.
        ledger
            Charged with `plan().cost` before noise is drawn. Without one, nobody adds up what is spent.

        Raises
        ------
        BudgetError
            If the ledger cannot pay.
        SeededNoiseError
            If `noise` is seeded and a ledger is given.
        TypeError, ValueError
            If the records are not real vectors of the right shape, or this object is fitted: a second release would
            cost a second time. Use sklearn.base.clone.
        """
        if hasattr(self, "plan_"):
            raise ValueError("this object is fitted; a second fit costs again. Use sklearn.base.clone(...).fit(...).")
        plan = self.plan()
        arrays, clamping = self._integers(plan, points)
        source = noise if noise is not None else noise_source("exact" if n_draws(arrays) >= _BULK else "auto")
        if ledger is not None:
            ledger.spend(plan.cost, noise=source, note=str(plan))
        add_noise(arrays, plan.blocks, source)
        self._hold(plan, arrays, bool(source.seeded))
        self.clamping_ = clamping
        return self

    def query(self, points: npt.ArrayLike) -> Floats:
        """The noisy sum at each point.

        Parameters
        ----------
        points
            Shape (m, dims), or (m,) for one dimension; finite, at most 1e30 in magnitude. They may lie outside the
            bounds.

        Returns
        -------
        float64, shape (m,). Noise may make a small sum negative. All answers share one noise: their errors are
        dependent.

        Raises
        ------
        NotFittedError
            Before `fit` or `load`.
        TypeError, ValueError
            If the points are not finite real vectors of the right shape.
        """
        check_is_fitted(self, "plan_")
        found: Floats = self._weight() * self.plan_.design.answers(self._prepared, self._queries(points))
        return found.view(SeededDraws) if self.seeded_ else found

    def standard_error(self, points: npt.ArrayLike) -> Floats:
        """Standard deviation of the noise in each answer; exact, and a function of public numbers alone.

        What the construction adds without noise is not in it: see `plan().approximation`.
        """
        check_is_fitted(self, "plan_")
        queries = self._queries(points)
        variance = self.plan_.design.variance(self.plan_.blocks, self._frame(), queries)
        found: Floats = self._weight() * np.sqrt(variance)
        return found

    @property
    def seeded(self) -> bool:
        """Whether the noise was seeded: then nothing is hidden, and `save` refuses."""
        return bool(getattr(self, "seeded_", False))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings and noisy integers as .npz, never pickled; the file is as public as the answers.

        Raises
        ------
        SeededNoiseError
            If the noise was seeded.
        FileExistsError
            If something is at `path`.
        """
        check_is_fitted(self, "plan_")
        refuse_seeded(self, what="this release")
        storage.write(path, type(self).__name__, self.get_params(deep=False), self.plan_, self.arrays_)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file is damaged or holds another class.
        FileNotFoundError
            If there is none.
        """
        where = Path(path)
        if not where.exists():
            raise FileNotFoundError(f"there is no private kernel sum at {where}.")
        try:
            head, arrays = storage.read(where, cls.__name__)
            found = cls(**head["settings"])
            design = cls._DESIGNS[head["design"].pop("name")](**head["design"])
            terms = Terms.make(head["law"], head["amount"], adjacency=found.adjacency, unit=found.unit)
            blocks = design.blocks(terms.law, terms.for_one_record(design.factor(terms.law)))
            plan = Plan(design, terms, blocks, head["noise_error"], head["approximation"])
            storage.check_arrays(arrays, design.shapes())
            found._hold(plan, arrays, False)
        except Exception as error:  # a damaged zip raises many kinds
            raise ValueError(f"{where} is not a saved {cls.__name__} or is damaged: {error}.") from None
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("clamping_", None)  # private
        return state

    def _hold(self, plan: Plan, arrays: Arrays, seeded: bool) -> None:
        self.plan_ = plan
        self.arrays_ = arrays
        self.seeded_ = seeded
        self._prepared = plan.design.prepare(arrays, self._frame())

    def _terms(self) -> tuple[Terms, ...]:
        """The budget as terms of each law that may be used."""
        same = {"adjacency": self.adjacency, "unit": self.unit}
        if (self.epsilon is None) == (self.rho is None):
            raise ValueError("exactly one of epsilon and rho must be given.")
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta must be in [0, 1), got {self.delta}.")
        if self.rho is not None:
            if self.delta:
                raise ValueError(f"delta must be 0 beside rho, got {self.delta}. Give epsilon and delta, or rho.")
            return (Terms.make("gaussian", self.rho, **same),)
        epsilon = cast(Real, self.epsilon)
        pure = Terms.make("laplace", epsilon, **same)
        if not self.delta:
            return (pure,)
        return pure, Terms.make("gaussian", rho_for(epsilon, self.delta, sharp=True), **same)

    @abstractmethod
    def _integers(self, plan: Plan, points: npt.ArrayLike) -> tuple[Arrays, Clamping]:
        """Exact integers of private records."""

    @abstractmethod
    def _queries(self, points: npt.ArrayLike) -> Floats:
        """Query points, checked, in the coordinates of the design."""

    @abstractmethod
    def _frame(self) -> Any:
        """What the design needs to turn integers into the data's units."""

    def _weight(self) -> float:
        return 1.0


def check_count(value: object, argument: str, least: int = 1, most: int | None = None) -> int:
    """An integer setting in range."""
    top = f" and at most {most:,}" if most is not None else ""
    wrong = isinstance(value, bool) or not isinstance(value, int | np.integer)
    if wrong or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        raise ValueError(f"{argument} must be an integer of at least {least}{top}, got {value!r}.")
    return int(value)  # type: ignore[call-overload,no-any-return]


def check_size(n: int) -> None:
    """Raise where 64-bit sums could overflow; far beyond what fits in memory."""
    if n >= 2**32:
        raise ValueError("points must be fewer than 2**32, or sums could leave 64 bits. Release them in parts.")
