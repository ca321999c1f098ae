"""Human or LLM? A zero-shot score calibrated on human texts: the p-value of "a human wrote this".

Under H0 the text is exchangeable with the calibration texts of its group, and the conformal p-value is valid for any
score. A p-value here speaks of texts, never of a person. Reference: `p_values`; Vovk and Wang (2021), arXiv:1912.06116.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from assay.conformal.calibration import Calibration, length_groups
from assay.conformal.p_values import ConformalPValues, Guarantee
from assay.detection.result import TestResult
from assay.detection.scorers import ScorerRecord
from assay.detection.text import load_tokenizer
from assay.detection.zero_shot.scores import LARGER_MEANS_LLM, text_scores

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer

Floats = npt.NDArray[np.float64]

NULL: Final = "a human wrote the text, and it is exchangeable with the calibration texts"
_NOT_CALIBRATED: Final = "Not tested: no calibration text is of this group's length."
_NOT_A_PERSON: Final = (
    "The p-value is how often human texts like those of the calibration look so machine-like. "
    "It is not the probability that a person cheated."
)


def calibrate(
    texts: Sequence[str],
    scorer: ModelScorer,
    *,
    score: str = "curvature",
    other: ModelScorer | None = None,
    groups: Sequence[str] | None = None,
    length_edges: Sequence[int] = (),
    guarantee: Guarantee = "marginal",
    confidence: float = 0.9,
    level: float = 0.05,
    min_tokens: int = 20,
    progress: bool = False,
) -> Calibration:
    """Calibrate a zero-shot score on human texts.

    Parameters
    ----------
    texts
        Human texts like those that will be tested. Texts with fewer counted tokens than `min_tokens` are left out.
    scorer
        The scoring model, with its tokenizer.
    score
        One of `zero_shot.LARGER_MEANS_LLM`.
    other
        The second model, for "binoculars".
    groups
        A group for each text (domain, language), calibrated apart (Mondrian): false positives are then controlled in
        each. None for one group.
    length_edges
        Ascending numbers of tokens at which length bins begin anew; each bin is calibrated apart.
    guarantee, confidence, level
        As in `ConformalPValues`.
    min_tokens
        Shortest text that is scored, >= 1; shorter ones get p = 1 when tested.
    progress
        Whether to show a progress bar on standard error.

    Returns
    -------
    Calibration, which `human_tests` takes and which can be saved.

    Raises
    ------
    ValueError
        On an unknown score, a missing second model, or a group with too few texts for `level`.

    Warns
    -----
    UserWarning
        If texts repeat: copies of a text count as further texts, which they are only where new texts repeat likewise.
    """
    if score not in LARGER_MEANS_LLM:
        raise ValueError(f"score must be one of {sorted(LARGER_MEANS_LLM)}, got {score!r}.")
    if (score == "binoculars") != (other is not None):
        raise ValueError("other must be given for score 'binoculars' and for no other score.")
    if min_tokens < 1:
        raise ValueError(f"min_tokens must be at least 1, got {min_tokens}.")
    edges = tuple(int(edge) for edge in length_edges)
    values, lengths = _scores(texts, scorer, other, score, progress=progress)
    if groups is not None and len(groups) != len(texts):
        raise ValueError(f"groups must hold one group per text ({len(texts)}), got {len(groups)}.")
    kept = (lengths >= min_tokens) & ~np.isnan(values)
    if not kept.any():
        raise ValueError(f"texts must hold human texts of at least {min_tokens} tokens, got none. Add longer ones.")
    labels = None if groups is None else np.asarray(groups, dtype=np.str_)[kept]
    names = length_groups(labels, lengths[kept], edges)
    model = ConformalPValues(
        alternative="greater" if LARGER_MEANS_LLM[score] else "less",
        guarantee=guarantee,
        confidence=confidence,
        level=level,
    )
    model.fit(values[kept], names)
    used = [text for text, keep in zip(texts, kept, strict=True) if keep]
    copies = len(used) - len(set(used))
    if copies:
        warnings.warn(
            f"{copies} of {len(used)} calibration texts repeat another one and make the calibration look larger than "
            "it is. Leave them out, unless new texts repeat as often.",
            stacklevel=2,
        )
    return Calibration(
        score=score,
        scorer=ScorerRecord.of(scorer),
        other=None if other is None else ScorerRecord.of(other),
        p_values=model,
        grouped=groups is not None,
        length_edges=edges,
        min_tokens=min_tokens,
        scores=values[kept],
        groups=names,
        texts_sha256=Calibration.hash_of(used),
    )


def human_tests(
    texts: Sequence[str],
    calibration: Calibration,
    scorer: ModelScorer,
    *,
    other: ModelScorer | None = None,
    groups: Sequence[str] | None = None,
    progress: bool = False,
) -> list[TestResult]:
    """Test of many texts whether a human wrote them. A small p-value says: few human texts look like this.

    Guarantee: for a human text exchangeable with the calibration texts of its group, P(pvalue <= a) <= a, over the draw
    of calibration and text, or for the calibration at hand with the stated confidence; see `ConformalPValues`.

    Parameters
    ----------
    texts
        Strings.
    calibration
        From `calibrate` or `Calibration.load`.
    scorer, other
        The models that were calibrated; others are refused.
    groups
        A calibrated group for each text, if the calibration has groups.
    progress
        Whether to show a progress bar on standard error.

    Returns
    -------
    One `TestResult` per text. A text shorter than the calibration's `min_tokens`, or in a length bin without
    calibration texts, is not tested: its p-value and e-value are 1 and it counts no token. The e-value of the others is
    the p-value's calibrator (1 - p + p log p) / (p (log p)^2).

    Raises
    ------
    CalibrationError
        If a scorer is not the calibrated one.
    ValueError
        If groups are missing or one was not calibrated.
    """
    calibration.check_scorers(scorer, other)
    known = calibration.group_names()
    if calibration.grouped != (groups is not None):
        raise ValueError(
            "groups must be given if and only if the calibration has groups; it has "
            f"{'some: ' + ', '.join(known) if calibration.grouped else 'none'}."
        )
    labels = None if groups is None else np.asarray(groups, dtype=np.str_)
    if labels is not None:
        # A group that nobody calibrated is a mistake of the caller's; a length is the text's own.
        named = {name.rsplit(", ", 1)[0] if calibration.length_edges else name for name in known}
        foreign = sorted(set(labels.tolist()) - named)
        if foreign:
            raise ValueError(
                f"groups must be among the calibrated ones {sorted(named)}, got {foreign[0]!r}. Calibrate on human "
                "texts of that group."
            )
    values, lengths = _scores(texts, scorer, other, calibration.score, progress=progress)
    names = length_groups(labels, lengths, calibration.length_edges)
    covered = np.isin(names, known)  # (n,)
    counted = (lengths >= calibration.min_tokens) & ~np.isnan(values) & covered
    pvalues = np.ones(len(texts))
    pvalues[counted] = calibration.p_values.p_values(values[counted], names[counted])
    assumptions = (*calibration.sentences(), _NOT_A_PERSON)
    return [
        TestResult(
            test=f"human-{calibration.score}",
            statistic=float(value) if counts else 0.0,
            log_pvalue=float(np.log(p)),
            log_evalue=p_to_log_e(float(p)) if counts else 0.0,  # no bet was made on a text that does not count
            n_tokens=int(length),
            n_scored=int(length) if counts else 0,
            null=f"{NULL} ({name})",
            alternative=calibration.p_values.alternative,
            assumptions=assumptions if has_bin else (_NOT_CALIBRATED, *assumptions),
        )
        for value, p, length, counts, name, has_bin in zip(
            values, pvalues, lengths, counted, names, covered, strict=True
        )
    ]


def p_to_log_e(pvalue: float) -> float:
    """log of the e-value (1 - p + p log p) / (p (log p)^2): the mean over k of k p^(k - 1), k uniform on (0, 1)."""
    if not 0.0 < pvalue <= 1.0:
        raise ValueError(f"pvalue must be in (0, 1], got {pvalue}.")
    log_p = math.log(pvalue)
    if log_p > -1e-3:  # the limit at p = 1 is 1 / 2; the formula loses all digits there
        return math.log(0.5) - log_p / 3.0
    return math.log1p(pvalue * (log_p - 1.0)) - log_p - 2.0 * math.log(-log_p)


def _scores(
    texts: Sequence[str], scorer: ModelScorer, other: ModelScorer | None, score: str, *, progress: bool
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """The score and the number of counted tokens of each text, from one pass."""
    if isinstance(texts, str):
        raise ValueError("texts must be a sequence of strings, got one string. Put it into a list.")
    tokenizer = load_tokenizer(_tokenizer_of(scorer))
    ids, offsets = tokenizer.encode_batch(list(texts))
    documents = [ids[a:b].astype(np.int64) for a, b in pairwise(offsets)]
    found = scorer.score(documents, other=other, progress=progress)
    # A text whose every token is the likeliest has an infinite score; it is compared like any other value.
    values = np.nan_to_num([text_scores(one)[score] for one in found], nan=np.nan)
    return values, np.array([int(np.sum(one.scored)) for one in found], dtype=np.int64)


def _tokenizer_of(scorer: Any) -> Any:
    if scorer.tokenizer is None:
        raise ValueError("scorer must have a tokenizer to read texts. Build it with ModelScorer(model, tokenizer).")
    return scorer.tokenizer
