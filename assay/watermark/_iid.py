"""How many tokens a watermark test needs, for i.i.d. tokens of a known law; exact wherever that can be enumerated.

H0: text independent of the key, Type I error alpha for every text. Source: Huang et al. (2023), arXiv:2312.07930,
section 4 (UMP rates); Aaronson (2022), Gumbel; Kirchenbauer et al. (2023), arXiv:2301.10226, green list.
For the texts of a real model see `_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats

from assay.watermark import _inversion, _scores, _types
from assay.watermark._green import binomial_type2_error, green_chance, smallest_binomial
from assay.watermark._laws import Floats, check_count, check_law, check_level, entropy, group_law

Test = Literal["ump", "race", "gumbel-model-aware", "gumbel-e-value", "gumbel-sum", "green-list"]
TESTS: tuple[Test, ...] = get_args(Test)

MAX_TOKENS = 10**9
MIN_GUMBEL_BETA = 1e-6
DRAWS = 4_000
_NEVER = 1e-30  # tokens rarer than this do not occur among 10**9
_NEGLIGIBLE = 50.0  # exp(-50) of a race's error is left out
_INVERSION_ERROR = 1e-9


class Type2(NamedTuple):
    """A Type II error, a bound on its numerical error (or one standard error), and how it was computed."""

    value: float
    error: float
    method: Literal["exact", "bracket", "inversion", "monte-carlo"]

    @property
    def proved(self) -> float:
        """The upper end of a bracket, else the value: what is compared with beta."""
        return self.value + self.error if self.method == "bracket" else self.value


@dataclass(frozen=True)
class TokenCount:
    """How many tokens a test needs.

    Attributes
    ----------
    tokens
        The smallest number of tokens, at least 1, at which the Type II error is at most beta.
    type2_error
        The Type II error there.
    error
        Bound on the numerical error of `type2_error`; one standard error where `method` is "monte-carlo".
    entropy
        Of the token law, in nats.
    method
        "exact": sums over types. "bracket": lattice with a rigorous bound. "inversion": Laplace inversion, averaged
        over types where the test needs it. "monte-carlo": simulated texts, exact p-value of each.
    """

    test: Test
    tokens: int
    type2_error: float
    error: float
    entropy: float
    method: Literal["exact", "bracket", "inversion", "monte-carlo"]


def tokens_needed(
    token_law: npt.ArrayLike,
    alpha: float,
    beta: float,
    test: Test = "ump",
    *,
    gamma: float = 0.25,
    delta: float = 2.0,
    seed: int = 0,
) -> TokenCount:
    """The number of i.i.d. tokens at which a test of level alpha misses a marked text with chance at most beta.

    Parameters
    ----------
    token_law
        float64, shape (V,): law of each token.
    alpha, beta
        Type I and Type II error, in (0, 1).
    test
        "ump": the limit, the most powerful watermark of the whole sequence. "race": one exponential race over all
        sequences. "gumbel-model-aware": token-wise Gumbel, exact p-value of the likelihood-ratio test given the model.
        "gumbel-e-value": the same, rejecting where its e-value is at least 1 / alpha. "gumbel-sum": token-wise Gumbel,
        sum of -log(1 - U). "green-list": exact binomial test of the count of green tokens.
    gamma, delta
        Green list: chance that a token of the vocabulary is green, independently, in (0, 1); logit bonus of green
        tokens, > 0 or infinite. It is the only one here that changes the law of the text.
    seed
        Of the simulated texts, where the token law has too many distinct probabilities to enumerate.

    Raises
    ------
    ValueError
        If an argument is out of range, beta is below 1e-6 for a Gumbel test, the token law has one atom only (no
        entropy, no watermark), or more than 10**9 tokens would be needed.

    Notes
    -----
    The Type II error falls with the number of tokens for "ump", "race" and "gumbel-model-aware" (proved in
    docs/explanation/ump.md), so bisection finds the smallest number. For "green-list", a saw-tooth, every number is
    tried in turn. For "gumbel-sum" and "gumbel-e-value" it is the crossing that bisection finds.
    """
    law, level, miss = check_law(token_law, "token_law"), check_level(alpha, "alpha"), check_level(beta, "beta")
    if np.count_nonzero(law) < 2:
        raise ValueError("token_law must have at least two tokens of positive probability: without entropy no mark.")

    if known_test(test).startswith("gumbel") and miss < MIN_GUMBEL_BETA:
        raise ValueError(
            f"beta must be at least {MIN_GUMBEL_BETA} for {test!r}, got {beta}: "
            "its Type II error is known to about 1e-7."
        )

    def error_at(n: int) -> Type2:
        return type2_error(law, n, level, test, gamma=gamma, delta=delta, seed=seed)

    if known_test(test) == "green-list":
        n = smallest_binomial(gamma, green_chance(law, gamma, delta), level, miss, MAX_TOKENS)
    else:
        # No test of level alpha needs fewer tokens than the most powerful one.
        start = 1 if test == "ump" else tokens_needed(law, level, miss).tokens
        n = _smallest(lambda n: error_at(n).proved, miss, start)
    value, error, method = error_at(n)
    return TokenCount(test=test, tokens=n, type2_error=value, error=error, entropy=entropy(law), method=method)


def type2_error(
    token_law: npt.ArrayLike,
    n: int,
    alpha: float,
    test: Test = "ump",
    *,
    gamma: float = 0.25,
    delta: float = 2.0,
    seed: int = 0,
) -> Type2:
    """The Type II error of a test on n i.i.d. tokens.

    Parameters
    ----------
    token_law, alpha, test, gamma, delta, seed
        As in `tokens_needed`.
    n
        Number of tokens, in 1..10**9.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    law, level = check_law(token_law, "token_law"), check_level(alpha, "alpha")
    count = check_count(n, "n", 1, MAX_TOKENS)
    kind = known_test(test)
    if kind == "green-list":
        return Type2(binomial_type2_error(count, gamma, green_chance(law, gamma, delta), level), 1e-12, "exact")
    log_p, multiplicity = group_law(law)
    shares = np.asarray(multiplicity * np.exp(log_p), dtype=np.float64)
    log_p, shares = log_p[shares > _NEVER], shares[shares > _NEVER]
    if kind in ("ump", "race"):
        return _sequence_error(log_p, shares, count, level, kind)
    if len(log_p) == 1 and log_p[0] == 0.0:
        return Type2(1.0 if kind != "gumbel-sum" else 1.0 - level, 0.0, "exact")
    if kind == "gumbel-sum":
        threshold = float(stats.gamma.isf(level, count))
        return Type2(
            _scores.score_cdf(threshold, np.exp(log_p), shares, count),
            _scores.ERROR + _inversion.ROUNDING * count,
            "inversion",
        )
    table = _types.type_table(shares, count)
    if table is None:
        return _simulated_error(log_p, shares, count, level, kind, seed)
    counts, mass = table
    missed = conditional_type2_error(np.exp(log_p), counts, level, e_value=kind == "gumbel-e-value")
    dropped = max(0.0, 1.0 - math.fsum(mass))
    return Type2(
        math.fsum(mass * missed) + dropped, dropped + _INVERSION_ERROR + _inversion.ROUNDING * count, "inversion"
    )


def conditional_type2_error(
    p: Floats, counts: npt.NDArray[np.int64], alpha: float, *, e_value: bool = False, tested_p: Floats | None = None
) -> Floats:
    """Chance that the model-aware Gumbel test misses a marked text, given the probabilities of its tokens.

    Given the text, S = sum (1/p - 1) (-log U) is a sum of (1/p - 1) Gamma(count) under H0 and of (1 - p) Gamma(count)
    where the text carries the mark.

    Parameters
    ----------
    p
        float64 in (0, 1), shape (groups,) or (texts, groups): probability of each token when it was drawn.
    counts
        int64, shape (texts, groups): how many tokens of the text have it; at least one per text.
    alpha
        Level.
    e_value
        Reject where prod (1/p) U^(1/p - 1) >= 1 / alpha, instead of by the exact p-value.
    tested_p
        Probabilities that the test uses, where they differ (a clipped or another model); shape as p.

    Returns
    -------
    float64, shape (texts,), absolute error below 1e-9.
    """
    tested = p if tested_p is None else tested_p
    weights = 1.0 / tested - 1.0
    if e_value:
        bound = np.sum(counts * -np.log(tested), axis=1) + math.log(alpha)
    else:
        bound = np.exp(_inversion.gamma_sum_quantile(math.log(alpha), weights, counts))
    out = np.ones(len(counts))
    some = bound > 0.0
    if some.any():
        true = np.broadcast_to(p * weights, counts.shape)[some]
        log_hit, _ = _inversion.log_gamma_sum_cdf(bound[some], true, counts[some])
        out[some] = -np.expm1(log_hit)
    return out


def known_test(test: str) -> Test:
    """The name of a test, checked."""
    if test not in TESTS:
        raise ValueError(f"test must be one of {list(TESTS)}, got {test!r}.")
    return test


def sequence_loss(surprisal: Floats, alpha: float, test: Literal["ump", "race"]) -> Floats:
    """Chance that a sequence of surprisal -log rho(x) nats is missed, given x: (1 - alpha/rho)+ or exp(-t/rho)."""
    if test == "ump":
        out: Floats = np.maximum(0.0, -np.expm1(np.minimum(0.0, math.log(alpha) + surprisal)))
        return out
    log_threshold = math.log(-math.log1p(-alpha))
    return np.exp(-np.exp(np.minimum(log_threshold + surprisal, 7.0)))


def _sequence_error(log_p: Floats, shares: Floats, n: int, alpha: float, test: Literal["ump", "race"]) -> Type2:
    """Type II error of the watermark of the whole sequence."""
    threshold = alpha if test == "ump" else -math.log1p(-alpha) / _NEGLIGIBLE
    ceiling = -math.log(threshold)

    def loss(surprisal: Floats) -> Floats:
        return sequence_loss(surprisal, alpha, test)

    atoms = _types.surprisal_atoms(log_p, shares, n, ceiling)
    if atoms is not None:
        level, log_mass = atoms
        value = math.fsum(np.exp(log_mass) * loss(level))
        return Type2(min(1.0, value), 1e-12 * value + (0.0 if test == "ump" else math.exp(-_NEGLIGIBLE)), "exact")
    low, high = _types.surprisal_bracket(log_p, shares, n, ceiling, loss)
    return Type2(0.5 * (low + high), 0.5 * (high - low), "bracket")


def _simulated_error(log_p: Floats, shares: Floats, n: int, alpha: float, test: Test, seed: int) -> Type2:
    """Model-aware tests by simulated texts; the p-value of each is exact."""
    rng = np.random.default_rng((seed, n))
    probability, chances = np.exp(log_p), shares / shares.sum()
    if len(log_p) <= n:
        counts, p = rng.multinomial(n, chances, size=DRAWS), probability
    else:
        counts, p = np.ones((DRAWS, n), dtype=np.int64), rng.choice(probability, size=(DRAWS, n), p=chances)
    statistic = np.sum((1.0 - p) * rng.standard_gamma(counts), axis=1)
    if test == "gumbel-e-value":
        missed = np.sum(counts * -np.log(p), axis=1) - statistic < -math.log(alpha)
    else:
        missed = _inversion.log_gamma_sum_cdf(statistic, 1.0 / p - 1.0, counts)[0] > math.log(alpha)
    value = float(np.mean(missed))
    return Type2(value, math.sqrt(max(value * (1.0 - value), 1.0 / DRAWS) / DRAWS), "monte-carlo")


def _smallest(error_at: Callable[[int], float], beta: float, start: int) -> int:
    """The smallest n >= start with error_at(n) <= beta, for a falling error: doubling, then bisection."""
    low, high = start - 1, start
    while error_at(high) > beta:
        low, high = high, 2 * high
        if high > MAX_TOKENS:
            raise ValueError(f"beta = {beta} needs more than {MAX_TOKENS} tokens: the entropy is too small.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_at(middle) <= beta else (middle, high)
    return high
