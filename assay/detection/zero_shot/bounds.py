"""Concentration of log-perplexity at entropy: the gap bound that knows only the vocabulary, and Freedman's.

If A wrote the text, x_n - H_n is a martingale difference (x surprisal, H entropy under A given the past), so their sum
stays near 0. Setting: arXiv:2501.02406. Constants and proofs: docs/explanation/zero-shot.md, Theorems 1 to 3; Freedman
(1975), Ann. Probab. 3; Ville (1939). Varentropy bound: Reeb and Wolf (2015), arXiv:1304.0036.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
from scipy import special

from assay.detection.result import TestResult
from assay.kernels.scoring.statistics import Floats, TokenStatistics

NULL: Final = "every counted token was drawn from the model's law after the decoding rule, given the text before it"
ASSUMPTIONS: Final = (
    "The scored law is the generator's: the same weights, decoding rule, and text before each token, prompt included.",
    "The token ids are those that were generated: a text that was tokenised anew may have other ids.",
)
FIXED_LENGTH: Final = "The number of tokens was fixed without looking at the text; see the tilt test for any other."

# Rates of Freedman's supermartingale: from long texts of high varentropy to short ones.
_RATES: Final[Floats] = np.ldexp(1.0, np.arange(-6, 1))


def max_varentropy(candidates: int) -> float:
    """Upper bound on the varentropy of any law over so many candidates: 1 + log(K - 1)**2 / 4.

    Parameters
    ----------
    candidates
        K >= 1; for K = 1, where the varentropy is 0, the bound is that of K = 2.

    Raises
    ------
    ValueError
        If candidates is not an integer >= 1.

    Notes
    -----
    The exact maximum lies less than 1 below it (Theorem 1).
    """
    if isinstance(candidates, bool) or candidates != int(candidates) or candidates < 1:
        raise ValueError(f"candidates must be an integer >= 1, got {candidates}. Pass the size of the vocabulary.")
    return 1.0 + math.log(max(candidates - 1, 1)) ** 2 / 4.0


def gap_log_bounds(gap: float, n: int, candidates: int) -> tuple[float, float]:
    """log of the bounds on P(L - H >= gap) and P(L - H <= -gap) for log-perplexity L and mean entropy H of n tokens.

    Holds for every model and every text of it of n tokens, n fixed (Theorem 2): with V = `max_varentropy(candidates)`
    the bounds are exp(-n (gap - V log(1 + gap / V))) and exp(-n (-gap - V log(1 - gap / V))).

    Parameters
    ----------
    gap
        In nats per token, >= 0.
    n
        Tokens, >= 0.
    candidates
        Number of tokens with positive probability, or more: the vocabulary.

    Raises
    ------
    ValueError
        If gap or n is negative or NaN.
    """
    if not (gap >= 0 and n >= 0):
        raise ValueError(f"gap and n must be at least 0, got {gap} and {n}.")
    v = max_varentropy(candidates)
    if n == 0 or gap == 0:
        return 0.0, 0.0
    if math.isinf(gap):
        return -math.inf, -math.inf
    u = gap / v
    above = -n * v * _minus_log1p(u)
    below = -n * v * _minus_log1p(-u) if u < 1 else -math.inf
    return above, below


def _minus_log1p(u: float) -> float:
    """u - log(1 + u), >= 0; by its series where the difference would cancel."""
    if abs(u) < 1e-2:
        return sum((-u) ** k / k for k in range(2, 10))
    return u - math.log1p(u)


def gap_test(statistics: TokenStatistics, *, candidates: int) -> TestResult:
    """The |log-perplexity - entropy| test of "this model wrote it", by the bound that knows only the vocabulary.

    Guarantee: P(pvalue <= a) <= a for every a, if each token was drawn from the scored law and the number of tokens was
    fixed in advance. Type I and type II errors fall exponentially with the length, but the constants are those of the
    worst law over the vocabulary: use `tilt_test` for power.

    Parameters
    ----------
    statistics
        Of one text; tokens that were not scored do not count.
    candidates
        Size of the vocabulary, or any bound on the number of tokens with positive probability.

    Returns
    -------
    TestResult with the statistic L - H in nats per token. With no scored token p and e are 1; with a token of
    probability 0 p is 0. The e-value is 1 / (2 sqrt(p)).

    Raises
    ------
    ValueError
        If candidates is not an integer >= 1.

    References
    ----------
    Radvand et al., arXiv:2501.02406, for the statistic and the exponential rate; the constants are Theorem 2 of
    docs/explanation/zero-shot.md.
    """
    scored = statistics.rows(statistics.scored)
    n = len(scored)
    gap = float(-np.mean(scored.log_prob) - np.mean(scored.entropy)) if n else 0.0
    above, below = gap_log_bounds(abs(gap), n, candidates)
    log_pvalue = min(0.0, math.log(2.0) + (above if gap > 0 else below))
    # A calibrator of Vovk and Wang (2021): 1 / (2 sqrt p) has mean 1 under a uniform p.
    log_evalue = -0.5 * log_pvalue - math.log(2.0) if n else 0.0
    return identity_result("entropy-gap", gap, log_pvalue, log_evalue, statistics, n, "two-sided", FIXED_LENGTH)


def freedman_test(statistics: TokenStatistics, *, candidates: int) -> TestResult:
    """Freedman's inequality, two-sided, with the varentropy of each token as the model gives it; anytime-valid.

    Guarantee: P(pvalue <= a) <= a for every a, whatever decided when the text ended, if each token was drawn from the
    scored law. The varentropies are functions of the text; the mixture over rates is what makes that lawful, where
    putting their observed sum into the textbook bound is not.

    Parameters
    ----------
    statistics, candidates
        As in `gap_test`. A surprisal more than log(candidates) above the entropy counts as exactly that much.

    Returns
    -------
    TestResult; the statistic is sum(x - H). p is 1 / the largest value of the mixture, e its last value.

    References
    ----------
    Freedman (1975), Ann. Probab. 3, Theorem 1.6; Theorem 3 of docs/explanation/zero-shot.md.
    """
    max_varentropy(candidates)  # the same check
    scored = statistics.rows(statistics.scored)
    n = len(scored)
    limit = math.log(max(candidates, 2))
    deviation = -scored.log_prob - scored.entropy  # (n,), +inf where the token was impossible
    # -p log p of the likeliest token bounds how far below its mean a surprisal can fall.
    reach = np.maximum(scored.entropy + scored.max_log_prob, 0.0)
    impossible = np.isneginf(scored.log_prob)
    down = np.where(impossible, 0.0, deviation)
    cost = [scored.varentropy[:, None] * _excess(_RATES, one) for one in (np.full_like(reach, limit), reach)]
    above = _RATES * np.minimum(deviation, limit)[:, None] - cost[0]
    below = -_RATES * down[:, None] - cost[1]
    steps = np.concatenate([above, below], axis=1)  # (n, 14)
    steps[impossible] = np.inf
    last, highest = mixed_process(steps)
    total = float(np.sum(deviation))
    return identity_result("freedman", total, -highest, last, statistics, n, "two-sided")


def _excess(rates: Floats, reach: Floats) -> Floats:
    """(exp(r b) - 1 - r b) / b**2 for rates r and reaches b, shape (n, rates); r**2 / 2 at b = 0."""
    u = reach[:, None] * rates
    small = u < 1e-3
    safe = np.where(small, 1.0, u)
    quotient = np.where(small, 0.5 + u / 6.0 + u * u / 24.0, (np.expm1(safe) - safe) / safe**2)
    out: Floats = rates**2 * quotient
    return out


def mixed_process(steps: Floats) -> tuple[float, float]:
    """log of the equal mixture of processes, at the end and at its highest (1 at the start included).

    Parameters
    ----------
    steps
        float64, shape (n, m): log-factors of m processes.
    """
    if len(steps) == 0:
        return 0.0, 0.0
    paths = special.logsumexp(np.cumsum(steps, axis=0), axis=1) - math.log(steps.shape[1])
    return float(paths[-1]), max(0.0, float(np.max(paths)))


def identity_result(
    test: str,
    statistic: float,
    log_pvalue: float,
    log_evalue: float,
    statistics: TokenStatistics,
    n_scored: int,
    alternative: Literal["greater", "two-sided"],
    *notes: str,
) -> TestResult:
    """A result of a test of "this model wrote it"."""
    return TestResult(
        test=test,
        statistic=statistic,
        log_pvalue=min(0.0, log_pvalue),
        log_evalue=log_evalue,
        n_tokens=len(statistics),
        n_scored=n_scored,
        null=NULL,
        alternative=alternative,
        assumptions=(*ASSUMPTIONS, *notes),
    )
