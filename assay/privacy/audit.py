"""Audits of privacy claims: three ways to catch a mechanism that is less private than it says.

`observed_sensitivity` compares a statistic on neighbouring data: no more than a declared sensitivity, or the claim is
false. `exact_loss` runs the real mechanism on every outcome of its noise: on tiny instances, the exact largest
log-ratio. `black_box_bound` only sees outputs: a lower confidence bound on epsilon. A claim below a bound is refuted; a
claim above all of them is not thereby proved. References: Clopper, Pearson (1934); Jagielski, Ullman, Oprea (2020),
arXiv:2006.07709; Steinke, Nasr, Jagielski (2023), arXiv:2305.08846 (one-run limit).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from assay.privacy.accounting import Adjacency
from assay.privacy.discrete import log_pmf_gaussian, log_pmf_laplace
from assay.privacy.noise import Integers, Shape

Record = TypeVar("Record")

_MOST_OUTCOMES = 10**6


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes
    ----------
    claimed
        The claim: a sensitivity or an epsilon.
    found
        What was seen: a largest change, an exact loss, or a lower confidence bound.
    confidence
        1 for what was computed; else the chance that the bound holds.
    method
        How, in words.
    """

    claimed: float
    found: float
    confidence: float
    method: str

    @property
    def refuted(self) -> bool:
        """Whether the claim is too low; beyond one part in 10**9 for rounding."""
        return self.found > self.claimed * (1 + 1e-9)

    def __str__(self) -> str:
        verdict = "refuted" if self.refuted else "not refuted"
        return f"{self.method}: claimed {self.claimed:.6g}, found {self.found:.6g}: {verdict}"


class ScriptedNoise:
    """A source that gives a script of draws and then zeros, and counts what it was asked for."""

    name = "scripted"
    seeded = True

    def __init__(self, script: Sequence[int]) -> None:
        self._script = list(script)
        self.asked: list[tuple[str, Fraction]] = []

    def laplace(self, scale: Fraction, size: Shape) -> Integers:
        """The next draws of the script."""
        return self._next("laplace", scale, size)

    def gaussian(self, variance: Fraction, size: Shape) -> Integers:
        """The next draws of the script."""
        return self._next("gaussian", variance, size)

    def _next(self, law: str, parameter: Fraction, size: Shape) -> Integers:
        count = size if isinstance(size, int) else math.prod(size)
        given, self._script = self._script[:count], self._script[count:]
        self.asked.append((law, parameter))
        return np.array(given + [0] * (count - len(given)), dtype=np.int64).reshape(size)


def neighbours(
    records: Sequence[Record], alternatives: Iterable[Record], adjacency: Adjacency
) -> Iterator[list[Record]]:
    """All data sets one record away.

    Parameters
    ----------
    records
        The data.
    alternatives
        Values that a record may be changed into, or that may be added; include extreme ones.
    adjacency
        "add-remove": one record less or more; "replace": one record changed.
    """
    values = list(alternatives)
    for place in range(len(records)):
        before, after = list(records[:place]), list(records[place + 1 :])
        if adjacency == "add-remove":
            yield before + after
        else:
            yield from ([*before, value, *after] for value in values)
    if adjacency == "add-remove":
        yield from ([*records, value] for value in values)


def observed_sensitivity(
    statistic: Callable[[Any], npt.ArrayLike],
    pairs: Iterable[tuple[Any, Any]],
    *,
    declared: float,
    norm: Literal["l1", "l2"] = "l1",
) -> Audit:
    """The largest change of a statistic over pairs of neighbours.

    Parameters
    ----------
    statistic
        What is noised, before the noise.
    pairs
        Neighbouring data sets; see `neighbours`.
    declared
        The sensitivity that the noise was made for.
    norm
        "l1" for Laplace noise, "l2" for Gaussian.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm must be 'l1' or 'l2', got {norm!r}.")
    worst, count = 0.0, 0
    for first, second in pairs:
        gap = np.ravel(np.asarray(statistic(first), dtype=np.float64) - np.asarray(statistic(second), dtype=np.float64))
        worst = max(worst, float(np.abs(gap).sum() if norm == "l1" else np.sqrt((gap**2).sum())))
        count += 1
    if not count:
        raise ValueError("pairs must not be empty.")
    return Audit(declared, worst, 1.0, f"{norm} sensitivity over {count} pairs of neighbours")


def exact_loss(
    mechanism: Callable[[Any, ScriptedNoise], Hashable],
    first: Any,
    second: Any,
    *,
    draws: int,
    reach: int,
    claimed: float,
    delta: float = 0.0,
) -> Audit:
    """The privacy loss of a mechanism between two data sets, by running it on all outcomes of its noise.

    Guarantee: with `delta` 0, the largest |log P/Q| over outcomes that no cut draw could have led to. With `delta`
    above 0, the smallest epsilon for which sum max(0, P - e^epsilon Q), both ways, is at most `delta` on those
    outcomes: a lower bound, short by at most the mass beyond `reach`. Condition: an outcome of a draw beyond `reach` is
    an outcome of a draw at the edge too, or of none within, as where data and noise are added, rounded, clamped or
    compared. Where draws come round again (a remainder), what is found is off by about the mass beyond `reach`.

    Parameters
    ----------
    mechanism
        Takes the data and a noise source; returns what is released, hashable. The law and the parameter of each draw
        are those that it asks the source for.
    first, second
        Neighbours.
    draws
        How many draws it uses.
    reach
        Each draw runs over -reach .. reach.
    claimed
        Epsilon.
    delta
        In [0, 1).

    Raises
    ------
    ValueError
        If there are too many outcomes, or a draw of the script does not reach the output.
    """
    outcomes = (2 * reach + 1) ** draws
    if draws < 1 or reach < 1 or outcomes > _MOST_OUTCOMES:
        raise ValueError(f"draws and reach must give at most 10**6 outcomes, got {outcomes}. Take a smaller instance.")
    for place in range(draws):
        # A draw that is never read would make the audit pass without having looked.
        script = [int(i == place) for i in range(draws)]
        if mechanism(first, ScriptedNoise(script)) == mechanism(first, ScriptedNoise([0] * draws)):
            raise ValueError(f"draw {place + 1} of {draws} does not change the output. Count the draws that it uses.")
    left, edge_left = _law(mechanism, first, draws, reach)
    right, edge_right = _law(mechanism, second, draws, reach)
    common = [key for key in left.keys() | right.keys() if key not in edge_left and key not in edge_right]
    p = np.array([left.get(key, 0.0) for key in common])
    q = np.array([right.get(key, 0.0) for key in common])
    method = f"all {outcomes} outcomes of {draws} draws"
    if not delta:
        with np.errstate(divide="ignore"):
            worst = float(np.max(np.abs(np.log(p) - np.log(q)), initial=0.0))
        return Audit(claimed, worst, 1.0, method)

    def excess(epsilon: float) -> float:
        grown = math.exp(epsilon)
        return float(max(np.maximum(p - grown * q, 0).sum(), np.maximum(q - grown * p, 0).sum()))

    low, high = 0.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > delta else (low, middle)
    return Audit(claimed, low, 1.0, f"{method}, delta {delta:g}")


def _law(
    mechanism: Callable[[Any, ScriptedNoise], Hashable], data: Any, draws: int, reach: int
) -> tuple[dict[Hashable, float], set[Hashable]]:
    """Masses of outputs, and the outputs that a draw at the edge leads to."""
    probe = ScriptedNoise([0] * draws)
    mechanism(data, probe)
    grid = np.arange(-reach, reach + 1)
    logs: list[npt.NDArray[np.float64]] = []
    for law, parameter in probe.asked:
        logs.append(log_pmf_laplace(grid, parameter) if law == "laplace" else log_pmf_gaussian(grid, parameter))
    # One request may serve many draws; then all of them have its law.
    tables = [logs[min(i, len(logs) - 1)] for i in range(draws)]
    masses: dict[Hashable, float] = defaultdict(float)
    edge: set[Hashable] = set()
    for script in itertools.product(range(-reach, reach + 1), repeat=draws):
        output = mechanism(data, ScriptedNoise(script))
        masses[output] += math.exp(sum(table[draw + reach] for table, draw in zip(tables, script, strict=True)))
        if max(map(abs, script)) == reach:
            edge.add(output)
    return masses, edge


def clopper_pearson_bound(
    hits_first: int, trials_first: int, hits_second: int, trials_second: int, *, delta: float = 0.0, beta: float = 0.01
) -> float:
    """A lower bound on epsilon from how often an event happened under two neighbours.

    Guarantee: at most the true epsilon with probability 1 - beta, for an event fixed before these trials:
    ln((p - delta) / q) with p's lower and q's upper Clopper-Pearson limit at beta / 4, both ways and for the
    complement.

    Parameters
    ----------
    hits_first, trials_first, hits_second, trials_second
        Counts; 0 <= hits <= trials, trials at least 1.
    delta
        Of the claim.
    beta
        In (0, 1).
    """
    for hits, trials in ((hits_first, trials_first), (hits_second, trials_second)):
        if trials < 1 or not 0 <= hits <= trials:
            raise ValueError(f"hits must be in 0 .. trials with trials at least 1, got {hits} of {trials}.")
    if not 0 < beta < 1 or not 0 <= delta < 1:
        raise ValueError(f"beta must be in (0, 1) and delta in [0, 1), got {beta} and {delta}.")
    from scipy.stats import beta as beta_law

    # Two sides of two counts, four one-sided limits, each used in the ratios of the event and of its complement.
    level = beta / 4

    def lower(hits: int, trials: int) -> float:
        return float(beta_law.ppf(level, hits, trials - hits + 1)) if hits else 0.0

    def upper(hits: int, trials: int) -> float:
        return float(beta_law.ppf(1 - level, hits + 1, trials - hits)) if hits < trials else 1.0

    p_low, p_high = lower(hits_first, trials_first), upper(hits_first, trials_first)
    q_low, q_high = lower(hits_second, trials_second), upper(hits_second, trials_second)
    ratios = [(p_low, q_high), (q_low, p_high), (1 - p_high, 1 - q_low), (1 - q_high, 1 - p_low)]
    return max(0.0, *(math.log((p - delta) / q) for p, q in ratios if p > delta and q > 0))


def black_box_bound(
    run: Callable[[bool], float], *, claimed: float, trials: int, delta: float = 0.0, beta: float = 0.01
) -> Audit:
    """A lower bound on epsilon from outputs alone.

    Guarantee: exceeds the true epsilon with probability at most beta: the event "output at least c" is chosen on a
    quarter of the trials and tested on the others.

    Parameters
    ----------
    run
        One fresh run of the whole mechanism; True for the first neighbour. Returns a number made from the release.
    claimed
        Epsilon.
    trials
        Runs per neighbour, at least 40.
    delta, beta
        See `clopper_pearson_bound`.
    """
    if type(trials) is not int or trials < 40:
        raise ValueError(f"trials must be an integer of at least 40, got {trials!r}.")
    first = np.array([run(True) for _ in range(trials)], dtype=np.float64)
    second = np.array([run(False) for _ in range(trials)], dtype=np.float64)
    cut = trials // 4
    test = trials - cut

    def bound(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], at: float, level: float) -> float:
        hits = int((a >= at).sum()), int((b >= at).sum())
        return clopper_pearson_bound(hits[0], len(a), hits[1], len(b), delta=delta, beta=level)

    candidates = np.unique(np.concatenate([first[:cut], second[:cut]]))
    candidates = candidates[:: max(1, len(candidates) // 200)]
    best = max(candidates, key=lambda at: bound(first[:cut], second[:cut], float(at), 0.3))
    found = bound(first[cut:], second[cut:], float(best), beta)
    return Audit(claimed, found, 1 - beta, f"{test} runs each, output at least {best:g}")


def one_run_limit(canaries: int, *, beta: float = 0.05) -> float:
    """The largest epsilon that one run with so many canaries can certify, even if every guess is right.

    ln(p / (1 - p)) with p = beta^(1/m): 5.8 for 1,000 canaries. What lies above it no such audit can see.
    """
    if type(canaries) is not int or canaries < 1 or not 0 < beta < 1:
        raise ValueError(f"canaries must be a positive integer and beta in (0, 1), got {canaries!r} and {beta}.")
    log_p = math.log(beta) / canaries
    return log_p - math.log(-math.expm1(log_p))
