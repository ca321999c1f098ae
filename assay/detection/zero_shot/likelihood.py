"""Likelihood-ratio e-values between sets of models: simple, composite by the largest likelihood, and mixtures.

Under "one of the null models wrote it" the ratio q / max_i p_i is at most q / p_true, whose mean is at most 1 for any
law q fixed before the text. Source: Wasserman, Ramdas and Balakrishnan (2020), arXiv:1912.11436 (universal inference);
Grunwald, de Heide and Koolen (2024), arXiv:1906.07801; Theorems 5 and 6 of docs/explanation/zero-shot.md.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.detection.result import TestResult
from assay.detection.zero_shot.bounds import ASSUMPTIONS
from assay.kernels.scoring.statistics import Floats

_TOLERANCE: Final = 1e-6  # nats; only sharpness depends on it
_STEPS: Final = 2000


def likelihood_ratio_test(null: npt.ArrayLike, alternative: npt.ArrayLike) -> TestResult:
    """Test "one of these models wrote the text" against "one of those did"; anytime-valid.

    Guarantee: if any one null model drew every token, P(pvalue <= a) <= a for every a, whatever ended the text, and the
    e-value has mean at most 1. The alternatives decide the power alone. Between two single models the e-value is the
    likelihood ratio itself, of mean exactly 1 where the alternative's support lies in the null's.

    Parameters
    ----------
    null, alternative
        float64, shapes (m, n) and (k, n), natural log, at most 0: each model's probability of each token of one text,
        -inf where its decoding rule forbids it. The same n tokens for all, so the same tokenizer.

    Returns
    -------
    TestResult; statistic and e-value as in `tilt_test`, for the process mean_j q_j / max_i p_i. Where every null model
    forbids a token, p is 0.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a value is NaN or above 0.
    """
    p, q = _checked("null", null), _checked("alternative", alternative)
    if p.shape[1] != q.shape[1]:
        raise ValueError(f"alternative must have {p.shape[1]} tokens as null has, got {q.shape[1]}.")
    path = ratio_path(p, q)
    highest = max(0.0, float(np.max(path, initial=0.0)))
    return result("likelihood-ratio", highest, -highest, float(path[-1]) if path.size else 0.0, p.shape[1])


def ratio_path(null: Floats, alternative: Floats) -> Floats:
    """log of mean_j q_j / max_i p_i after each token, float64 of shape (n,); +inf once every p_i is 0."""
    p = np.max(np.cumsum(null, axis=1), axis=0)
    with np.errstate(divide="ignore"):  # every alternative may be impossible
        q = special.logsumexp(np.cumsum(alternative, axis=1), axis=0) - math.log(len(alternative))
    refuted = np.isneginf(p)
    return np.where(refuted, np.inf, q - np.where(refuted, 0.0, p))


def mixture_test(null: npt.ArrayLike, alternative: npt.ArrayLike) -> TestResult:
    """Test "each token came from one and the same mixture of these models", with unknown weights, at the text's end.

    Guarantee: as `likelihood_ratio_test`, for every choice of the weights, if the text's length did not depend on the
    outcome. The divisor is an upper bound on the largest likelihood over all weights, certified by duality, so a
    maximisation that stopped early costs power and never validity. A mixture of whole texts (one model drawn, then the
    text from it) is already covered by `likelihood_ratio_test`, because its likelihood is at most the largest member's.

    Parameters
    ----------
    null, alternative
        As in `likelihood_ratio_test`.

    Returns
    -------
    TestResult; p = 1 / e.
    """
    p, q = _checked("null", null), _checked("alternative", alternative)
    if p.shape[1] != q.shape[1]:
        raise ValueError(f"alternative must have {p.shape[1]} tokens as null has, got {q.shape[1]}.")
    bound = mixture_log_supremum(p)
    if p.shape[1] == 0:
        log_evalue = 0.0
    elif bound == -math.inf:
        log_evalue = math.inf
    else:
        log_evalue = float(special.logsumexp(np.sum(q, axis=1))) - math.log(len(q)) - bound
    return result("mixture-likelihood-ratio", log_evalue, -max(0.0, log_evalue), log_evalue, p.shape[1])


def mixture_log_supremum(log_probabilities: Floats) -> float:
    """A number at least sup_w sum_t log sum_i w_i p_i(t) over weights w, and within 1e-6 nats of it as a rule.

    Parameters
    ----------
    log_probabilities
        float64, shape (m, n).

    Notes
    -----
    The objective f is concave with gradient g_i = sum_t p_i(t) / sum_j w_j p_j(t) and sum_i w_i g_i = n, so its maximum
    is at most f(w) + max_i g_i - n at every w. Expectation-maximisation, w_i <- w_i g_i / n, closes the gap.
    """
    if log_probabilities.shape[1] == 0:
        return 0.0
    top = np.max(log_probabilities, axis=0)
    if np.any(np.isneginf(top)):
        return -math.inf
    ratios = np.exp(log_probabilities - top)  # (m, n), in [0, 1]
    n = ratios.shape[1]
    weights = np.full(len(ratios), 1.0 / len(ratios))
    best = math.inf
    for _ in range(_STEPS):
        mixed = weights @ ratios  # (n,), > 0: every weight stays positive while it matters
        gradient = ratios @ (1.0 / mixed)
        value = float(np.sum(np.log(mixed)))
        best = min(best, value + float(np.max(gradient)) - n)
        if best - value < _TOLERANCE:
            break
        weights = weights * gradient / n
    return best + float(np.sum(top))


def result(test: str, statistic: float, log_pvalue: float, log_evalue: float, n: int) -> TestResult:
    """A result against "one of the null models wrote the text"."""
    return TestResult(
        test=test,
        statistic=statistic,
        log_pvalue=min(0.0, log_pvalue),
        log_evalue=log_evalue,
        n_tokens=n,
        n_scored=n,
        null="one of the null models wrote the text",
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )


def _checked(name: str, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or len(array) == 0:
        raise ValueError(f"{name} must have shape (models, tokens) with at least one model, got {array.shape}.")
    if np.any(np.isnan(array)) or np.any(array > 0):
        raise ValueError(f"{name} must hold natural logarithms in [-inf, 0]; found nan or a positive number.")
    return array
