"""Human or LLM? Scores of a text under a model, all from one scoring pass. None is a p-value before it is calibrated.

A human has no model, so no formula gives these scores' error rates: calibrate them on human texts. Sources: GLTR
(arXiv:1906.04043), DetectGPT (arXiv:2301.11305), DetectLLM (arXiv:2306.05540), Fast-DetectGPT (arXiv:2310.05130),
Binoculars (arXiv:2401.12070), entropy gap (arXiv:2501.02406).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from assay.detection.zero_shot.identity import Document, after_burn_in, readable
from assay.kernels.scoring.statistics import Floats, TokenStatistics

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer

Mask = npt.NDArray[np.bool_]

LARGER_MEANS_LLM: Final[Mapping[str, bool]] = MappingProxyType(
    {
        "log_perplexity": False,
        "entropy_gap": False,
        "curvature": True,
        "rank": False,
        "log_rank": False,
        "lrr": True,
        "binoculars": False,
    }
)
"""Each score's name, and whether its larger values speak for a language model."""


def text_scores(statistics: TokenStatistics) -> dict[str, float]:
    """Every score of one text from the statistics of one pass.

    Parameters
    ----------
    statistics
        Of one text; tokens that were not scored do not count.

    Returns
    -------
    dict with, for N counted tokens of surprisal x, entropy H, varentropy V and rank r (ties count half):

    log_perplexity
        mean x, in nats per token.
    entropy_gap
        mean x - mean H.
    curvature
        sum(H - x) / sqrt(sum V); 0 where nothing varies. Fast-DetectGPT's analytic score with one model.
    rank, log_rank
        mean r and mean log r.
    lrr
        sum x / sum log r; +inf where every token was the likeliest.
    binoculars
        mean x over mean cross-entropy, if a second model was given: the paper's ratio, where the first model both reads
        the text and weighs the cross-entropy. Both means are over the same tokens. See `binoculars_scores`.

    All are NaN where no token counts; +-inf where the decoding rule forbids a token.
    """
    counted = statistics.rows(statistics.scored)
    names = [name for name in LARGER_MEANS_LLM if name != "binoculars" or counted.cross_entropy is not None]
    if len(counted) == 0:
        return dict.fromkeys(names, float("nan"))
    surprisal = -counted.log_prob
    ranks = counted.rank + counted.ties / 2
    log_ranks = np.log(ranks)
    excess = float(np.sum(surprisal - counted.entropy))
    spread = float(np.sqrt(np.sum(counted.varentropy)))
    out = {
        "log_perplexity": float(np.mean(surprisal)),
        "entropy_gap": excess / len(counted),
        "curvature": -excess / spread if spread > 0 else 0.0,
        "rank": float(np.mean(ranks)),
        "log_rank": float(np.mean(log_ranks)),
        "lrr": _ratio(float(np.sum(surprisal)), float(np.sum(log_ranks))),
    }
    if counted.cross_entropy is not None:
        out["binoculars"] = _ratio(out["log_perplexity"], float(np.mean(counted.cross_entropy)))
    return out


def zero_shot_scores(
    documents: Sequence[Document],
    scorer: ModelScorer,
    *,
    other: ModelScorer | None = None,
    prompt: Sequence[Any] | None = None,
    burn_in: int = 0,
    progress: bool = False,
) -> dict[str, Floats]:
    """Every score of many texts from one pass of the model; none is a p-value before it is calibrated.

    Parameters
    ----------
    documents
        Strings, UTF-8 bytes, or token ids, one per text.
    scorer
        The scoring model; for Binoculars, the observer.
    other
        A second model over the same vocabulary, for Binoculars: the performer.
    prompt, burn_in
        As in `identity_tests`.
    progress
        Whether to show a progress bar on standard error.

    Returns
    -------
    dict of float64 arrays of shape (documents,): see `text_scores`. `LARGER_MEANS_LLM` tells their direction.

    Raises
    ------
    TextError
        If a text is not valid Unicode or its bytes are not UTF-8.
    ValueError
        As `ModelScorer.score`.
    """
    checked = [readable(document) for document in documents]
    found = scorer.score(checked, prompt=prompt, other=other, progress=progress)
    rows = [text_scores(after_burn_in(one, burn_in)) for one in found]
    names = [name for name in LARGER_MEANS_LLM if name != "binoculars" or other is not None]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}


def binoculars_scores(
    documents: Sequence[Document],
    observer: ModelScorer,
    performer: ModelScorer,
    *,
    compatible: bool = False,
    pad_token_id: int | None = None,
) -> Floats:
    """Binoculars with the performer's log-perplexity, as its authors' program computes it; small speaks for an LLM.

    The program divides the performer's mean surprisal by the mean cross-entropy -sum_v p_v log q_v of observer p and
    performer q. It averages the first over the N - 1 tokens that have a predecessor, and the second over N places:
    these and the one after the last token, which predicts nothing in the text. By default both means here are over the
    same tokens, which matters for short texts. The program also leaves places out of the second mean alone where the
    token read is the padding token, which in many vocabularies is also the end of a text.

    Parameters
    ----------
    documents
        As in `zero_shot_scores`.
    observer, performer
        Models over the same vocabulary. Two passes: of both models together, and of the performer.
    compatible
        Whether to average as the authors' program does. For its exact numbers, build the scorers with
        `add_bos=False` for tokenizers that add no special token.
    pad_token_id
        With `compatible`: the padding token, whose places the program leaves out.

    Returns
    -------
    float64, shape (documents,); NaN where no token counts. The authors' thresholds hold for their pair of models only.

    Raises
    ------
    ValueError
        If a text exceeds the window with `compatible`, whose program cuts it; and as `ModelScorer.score`.

    References
    ----------
    Hans et al. (2024), arXiv:2401.12070, equation 4.
    """
    checked = [readable(document) for document in documents]
    theirs = performer.score(checked)
    if not compatible:
        ours = observer.score(checked, other=performer)
        return np.array(
            [_binoculars(a, b, a.scored & b.scored, a.scored & b.scored) for a, b in zip(theirs, ours, strict=True)],
            dtype=np.float64,
        )
    ids = [_ids(document, observer) for document in checked]
    longest = max(map(len, ids), default=0)
    if longest >= observer.window:
        raise ValueError(
            f"documents must be shorter than the window ({observer.window}), got {longest} tokens. Cut them."
        )
    # One more token, any token, makes the scorer look at the place after the last one.
    extended = observer.score([np.append(one, 0) for one in ids], other=performer)
    first = observer.model.config.get_text_config().bos_token_id
    out = []
    for one, a, b in zip(ids, theirs, extended, strict=True):
        read = np.append(-1 if first is None else first, one)  # the token read at each place
        out.append(_binoculars(a, b, a.scored, b.scored & (read != pad_token_id)))
    return np.array(out, dtype=np.float64)


def _ids(document: Any, scorer: ModelScorer) -> npt.NDArray[np.int64]:
    if isinstance(document, str):
        if scorer.tokenizer is None:
            raise ValueError("observer must have a tokenizer to read texts, got none. Pass token ids, or tokenizer=.")
        document = scorer.tokenizer(document, add_special_tokens=False)["input_ids"]
    return np.asarray(document, dtype=np.int64)


def _binoculars(performer: TokenStatistics, observer: TokenStatistics, above: Mask, below: Mask) -> float:
    """The ratio of means over the places `above` and `below` the line."""
    if observer.cross_entropy is None or not np.any(above) or not np.any(below):
        return float("nan")
    return _ratio(float(np.mean(-performer.log_prob[above])), float(np.mean(observer.cross_entropy[below])))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("inf")
