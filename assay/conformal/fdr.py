"""False discovery rates of corpora: Storey's adaptive procedure, e-BH, and the share of a corpus that is not human.

Reference: Storey, Taylor, Siegmund (2004), JRSS B 66; Wang and Ramdas (2022), JRSS B 84, arXiv:2009.02824 (e-BH).
Benjamini-Hochberg itself is `assay.detection.multiplicity.benjamini_hochberg`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from assay.detection.multiplicity import benjamini_hochberg

Floats = npt.NDArray[np.float64]


def storey(log_pvalues: npt.ArrayLike, *, cut: float = 0.5) -> Floats:
    """Storey's q-values: Benjamini-Hochberg sharpened by an estimate of the share of true nulls.

    Guarantee: rejecting where q <= a has a false discovery rate of at most a, for independent p-values. Conformal
    p-values that share one calibration set are not independent; for them the rate is shown by simulation in the tests.

    Parameters
    ----------
    log_pvalues
        float64, shape (n,), natural logarithms in [-inf, 0].
    cut
        p-values above it are taken for nulls, in (0, 1).

    Returns
    -------
    float64, shape (n,): natural logarithms, at most 0; 0 where p > cut, which is never rejected.

    Raises
    ------
    ValueError
        If cut is out of range, a value is nan or above 0, or the input is not one-dimensional.
    """
    if not 0.0 < cut < 1.0:
        raise ValueError(f"cut must be in (0, 1), got {cut}.")
    values = np.asarray(log_pvalues, dtype=np.float64)
    benjamini_hochberg(values)  # its checks, of the p-values above the cut too: a nan is not a null
    # Thresholds above the cut are not Storey's: a p-value there must not lend its rank to those below, or many of them
    # would get a q-value that no threshold up to the cut attains.
    below = values <= math.log(cut)
    out: Floats = np.zeros(len(values))
    above = len(values) - int(below.sum())
    if below.any():
        adjusted = benjamini_hochberg(values[below])
        # n p / rank times the estimated share of nulls; Benjamini-Hochberg over m <= n p-values gives m p / rank.
        share = (1.0 + above) / (1.0 - cut)
        out[below] = np.minimum(adjusted + math.log(share) - math.log(below.sum()), 0.0)
    return out


def e_bh(log_evalues: npt.ArrayLike) -> Floats:
    """e-BH q-values: rejecting where q <= a has a false discovery rate of at most a, whatever the dependence.

    Parameters
    ----------
    log_evalues
        float64, shape (n,), natural logarithms in [-inf, inf], each of an e-value: mean at most 1 under its null.

    Returns
    -------
    float64, shape (n,), same order: natural logarithms, at most 0.

    Notes
    -----
    e-BH is Benjamini-Hochberg on 1 / e; for e-values it needs no condition on dependence.
    """
    values = np.asarray(log_evalues, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("log_evalues must be natural logarithms in [-inf, inf], found nan.")
    return benjamini_hochberg(np.minimum(0.0, -values))


@dataclass(frozen=True)
class ShareInterval:
    """A confidence interval for a share of a corpus.

    Attributes
    ----------
    low, high
        In [0, 1].
    confidence
        Of the interval.
    """

    low: float
    high: float
    confidence: float


def share_interval(
    flagged: int,
    documents: int,
    *,
    human_flagged: int,
    humans: int,
    machine_flagged: int | None = None,
    machines: int | None = None,
    confidence: float = 0.95,
) -> ShareInterval:
    """Confidence interval for the share of a corpus that is not human, from how often a fixed threshold flags.

    It says how many, never who. Guarantee: P(low <= share <= high) >= confidence, if the threshold was chosen without
    these texts, the human texts are like the corpus's human texts, and the machine texts like its machine texts. The
    lower end needs no machine text; without any the upper end is 1.

    Parameters
    ----------
    flagged, documents
        Of the corpus: documents at or past the threshold, of how many.
    human_flagged, humans
        The same of known human texts.
    machine_flagged, machines
        The same of known machine texts, or None.
    confidence
        In (0, 1).

    Notes
    -----
    The corpus is flagged at rate q = share * tpr + (1 - share) * fpr. Each rate gets a Clopper-Pearson interval at an
    equal part of the error (Bonferroni), and the share's ends are taken at their worst corner.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}.")
    if (machine_flagged is None) != (machines is None):
        raise ValueError("machine_flagged and machines must be given together or not at all.")
    counts = [("flagged", flagged, documents), ("human_flagged", human_flagged, humans)]
    if machine_flagged is not None and machines is not None:
        counts.append(("machine_flagged", machine_flagged, machines))
    for name, count, of in counts:
        if of < 1 or not 0 <= count <= of:
            raise ValueError(f"{name} must be in [0, {of}] with at least one document, got {count}.")
    # One-sided bounds: two for the lower end alone, six for both ends with machine texts.
    tail = (1.0 - confidence) / (2 if machines is None else 6)
    q_low, q_high = _interval(flagged, documents, tail)
    fpr_low, fpr_high = _interval(human_flagged, humans, tail)
    tpr_low, tpr_high = 0.0, 1.0
    if machine_flagged is not None and machines is not None:
        tpr_low, tpr_high = _interval(machine_flagged, machines, tail)
    # (q - fpr) / (tpr - fpr) grows with q and falls with tpr and fpr, wherever fpr <= q <= tpr.
    low = max(0.0, (q_low - fpr_high) / (tpr_high - fpr_high)) if tpr_high > fpr_high else 0.0
    high = min(1.0, max(0.0, (q_high - fpr_low) / (tpr_low - fpr_low))) if tpr_low > fpr_low else 1.0
    return ShareInterval(min(low, high), high, confidence)


def _interval(count: int, of: int, tail: float) -> tuple[float, float]:
    """Clopper-Pearson bounds, each wrong with probability at most `tail`."""
    low = 0.0 if count == 0 else float(stats.beta.ppf(tail, count, of - count + 1))
    high = 1.0 if count == of else float(stats.beta.isf(tail, count + 1, of - count))
    return low, high
