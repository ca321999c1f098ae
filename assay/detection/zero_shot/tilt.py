"""The tilt e-process: exact evidence against "this model wrote it", from the numbers of one scoring pass.

Under H0 each factor exp(s x - log sum_v p_v**(1 - s)) has mean 1 given the past, for every s < 1: it is the likelihood
ratio of the model at temperature 1 / (1 - s) to the model itself. Source: Ville (1939); Howard et al. (2020),
arXiv:1808.03204 (Cramer-Chernoff processes); setting of arXiv:2501.02406; Theorem 4 of docs/explanation/zero-shot.md.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from scipy import special

from assay.detection.result import TestResult
from assay.detection.zero_shot.bounds import identity_result
from assay.kernels.scoring.statistics import Floats, TokenStatistics

# Parts of the smallest tilt of the grid that are added to it: long texts are best judged at smaller tilts than short
# ones, and these cost no further pass over the vocabulary.
_FINER: Final = (0.75, 0.5, 0.25)
# Their share of the mixture: gross differences show at any weight, small ones in long texts need theirs.
_FINER_SHARE: Final = 2 / 3


def tilt_steps(statistics: TokenStatistics, *, support_noise: float = 0.0) -> Floats:
    """Log-factors of the tilt processes, one per scored token and tilt.

    Parameters
    ----------
    statistics
        Of one text.
    support_noise
        See `tilt_test`.

    Returns
    -------
    float64, shape (n_scored, processes): s x - log sum_v p_v**(1 - s) for each tilt of the grid, then those of
    `finer_steps`. +inf for a token that the decoding rule forbids, unless `support_noise` gives it a finite price.

    Raises
    ------
    ValueError
        If support_noise is not in [0, 1), or the statistics hold no tilts.
    """
    if not 0 <= support_noise < 1:
        raise ValueError(f"support_noise must be in [0, 1), got {support_noise}. 0 means exact arithmetic.")
    if len(statistics.tilts) == 0:
        raise ValueError("statistics must hold at least one tilt, got none. Score with ModelScorer(..., tilts=...).")
    scored = statistics.rows(statistics.scored)
    impossible = np.isneginf(scored.log_prob)
    surprisal = np.where(impossible, 0.0, -scored.log_prob)
    steps = surprisal[:, None] * scored.tilts - scored.tilted_log_sums
    steps = np.concatenate([steps, finer_steps(scored, surprisal - scored.entropy)], axis=1)
    if support_noise == 0:
        steps[impossible] = np.inf
        return steps
    # Under a law that strays from the support with probability e <= noise, factors (1 - g) on the support and c off it
    # have mean (1 - e)(1 - g) + e c, at most 1 where c = 1 + g (1 - noise) / noise. With g = sqrt(noise) a text without
    # stray tokens pays next to nothing and a stray token counts about 1 / sqrt(noise).
    give = math.sqrt(support_noise)
    steps += math.log1p(-give)
    steps[impossible] = math.log1p(give * (1.0 - support_noise) / support_noise)
    return steps


def finer_steps(statistics: TokenStatistics, deviation: Floats) -> Floats:
    """Log-factors at tilts between the smallest pair -S, S of the grid: supermartingales, from the moments at hand.

    With Y = x - H and |s| <= S, E exp(s Y) is at most
    1 + s**2 V / 2 + s**3 m3 / 6 + (s / S)**4 (E exp(S Y) + E exp(-S Y) - 2 - S**2 V): Theorem 4, part 2. The bound
    exceeds the mean in the fourth order only.

    Parameters
    ----------
    statistics
        Of scored tokens.
    deviation
        float64, shape (n,): x - H.

    Returns
    -------
    float64, shape (n, 6): tilts 3S/4, -3S/4, S/2, -S/2, S/4, -S/4; shape (n, 0) where the grid holds no such pair.
    """
    tilts = statistics.tilts
    pairs = [i for i in np.argsort(tilts) if tilts[i] > 0 and -tilts[i] in tilts]
    if not pairs:
        return np.empty((len(statistics), 0))
    size = float(tilts[pairs[0]])
    sums = [statistics.tilted_log_sums[:, int(np.flatnonzero(tilts == sign * size)[0])] for sign in (1, -1)]
    means = [np.expm1(log_sum - sign * size * statistics.entropy) for log_sum, sign in zip(sums, (1, -1), strict=True)]
    v = statistics.varentropy
    fourth = np.maximum(means[0] + means[1] - size**2 * v, 0.0)
    steps = []
    for part in _FINER:
        for s in (part * size, -part * size):
            log_mean = np.log1p(s * s * v / 2 + s**3 * statistics.third_moment / 6 + part**4 * fourth)
            steps.append(s * deviation - log_mean)
    return np.stack(steps, axis=1)


def tilt_path(statistics: TokenStatistics, *, support_noise: float = 0.0) -> Floats:
    """log M_n after each scored token, for the mixture of the tilt processes.

    Two thirds of the weight lie equally on the finer tilts, where the grid has them, the rest equally on the grid's.

    Parameters
    ----------
    statistics, support_noise
        As in `tilt_test`.

    Returns
    -------
    float64, shape (n_scored,).
    """
    steps = tilt_steps(statistics, support_noise=support_noise)
    count, finer = len(statistics.tilts), steps.shape[1] - len(statistics.tilts)
    share = _FINER_SHARE if finer else 0.0
    weights = np.concatenate([np.full(count, (1 - share) / count), np.full(finer, share / max(finer, 1))])
    out: Floats = special.logsumexp(np.cumsum(steps, axis=0) + np.log(weights), axis=1)
    return out


def tilt_test(statistics: TokenStatistics, *, support_noise: float = 0.0) -> TestResult:
    """Exact, anytime-valid test of "this model, with this decoding rule, wrote the text".

    Guarantee: if each token was drawn from the scored law, then P(pvalue <= a) <= a for every a, however it was decided
    when the text ends, and the e-value has mean at most 1. No bound on surprisals, no asymptotics: the model's own
    tilted sums normalise each factor. Powerful against text that is hotter or colder than the model, truncated
    otherwise, or written by anything that finds other tokens likely than the model does.

    Parameters
    ----------
    statistics
        Of one text under one decoding rule; the process is a mixture over `statistics.tilts` and three smaller
        tilts of each sign.
    support_noise
        Largest probability with which the generator's arithmetic may emit a token that the decoding rule, recomputed
        here, forbids; in [0, 1). With 0 one such token refutes the null outright: p is 0 and log p is -inf, because
        under the null it cannot happen. Above 0 it counts about 1 / sqrt(support_noise). 1e-4 suits a generator in
        half precision, whose edge of top-k or top-p may lie one candidate further.

    Returns
    -------
    TestResult; the statistic is the largest value of log M_n over n, p = exp(-statistic), the e-value is M at the end.
    With no scored token p and e are 1.

    Raises
    ------
    ValueError
        If support_noise is not in [0, 1), or the statistics hold no tilts.

    Notes
    -----
    O(n) time and memory per tilt. By Ville's inequality P(sup_n M_n >= 1 / a) <= a.
    """
    path = tilt_path(statistics, support_noise=support_noise)
    last, highest = (float(path[-1]), max(0.0, float(np.max(path)))) if len(path) else (0.0, 0.0)
    forbidden = int(np.sum(np.isneginf(statistics.log_prob[statistics.scored])))
    notes = []
    if forbidden and support_noise == 0:
        notes.append(
            f"{forbidden} tokens have probability 0 under the decoding rule, which refutes the null outright; "
            "support_noise= allows for rounding in the generator."
        )
    elif support_noise:
        notes.append(
            f"A token outside the support may come from rounding with probability up to {support_noise:g}; "
            f"{forbidden} were found."
        )
    return identity_result("tilt", highest, -highest, last, statistics, len(path), "greater", *notes)
