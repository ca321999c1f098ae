"""Tests of the sequence watermark: do the keyed reals lie in the intervals of the text's blocks?

For a text written without the key the reals are uniform and independent of it, so the chance that those of the first m
blocks lie in given intervals is the product of the intervals' lengths. "ump": all reals lie inside; the place of the
last real in its interval breaks the tie, which makes the test uniformly most powerful, Type II = sum (rho - a)+ at
every level a. "prefix": the shortest product over the beginnings of the text (Ville). Reference: Huang et al. (2023),
Thm 3.2, arXiv:2312.07930; Ville (1939).

**Validity of "ump".** Fix the text, the laws and the tolerance; they determine blocks and intervals. Let a block's
interval have L grid points, of a grid of G, and number them 1 .. L; let r be the number of the block's real. Put
p = (L_1 / G) ... (L_{m-1} / G) (r_m / G) if all reals lie inside, else 1. For a < 1, p <= a requires the first m - 1
reals inside, which has chance prod L_j / G, and r_m <= a G / prod(L_j / G), which has conditional chance at most
a / prod(L_j / G). Hence P(p <= a) <= a. Nothing was asked of the intervals but that they do not depend on the
reals: widening them, or a wrong model, costs power and never validity.

**Power of "ump".** In a marked text of probability rho the reals are uniform on the block's intervals, which have
product rho. So P(p <= a | text) = min(1, a / rho), and the Type II error is sum max(rho - a, 0): no test of any
distortion-free watermark has less.

**Validity of "prefix".** M_t = prod over blocks, up to token t, of 1[real inside] / length is a nonnegative martingale
from 1 as t grows, because intervals within a block are nested and a real that is inside is uniform there. By Ville's
inequality P(max M_t >= 1 / a) <= a.

**Rounding.** Generator and detector compute log-probabilities that differ, by batch and by precision. If none differs
by more than the tolerance e, cumulated probabilities S differ at most as S / (S + (1 - S) exp(+-2e)) does; composing
these bounds over a block gives the widened interval, which contains the generator's. Where the widths cannot decide
whether a block has ended, both readings are followed with weights 15/16 for the detector's own and 1/16 for the other;
p-values are divided by the weight of their reading (weighted Bonferroni) and martingales averaged with these weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from assay.detection.combine import best_of
from assay.detection.result import TestResult
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.sequence import GRID, Interval, SequenceConfig, config_of, cumulated, nonce_words, reals

TESTS: tuple[str, ...] = ("ump", "prefix")
NULL = "the text was written without knowledge of the key"
ASSUMPTIONS = (
    "The key was secret: whoever wrote an unmarked text could not compute its PRF.",
    "The nonce was fixed before the text was tested. A wrong model, prompt or nonce costs power, never validity.",
)

Floats = npt.NDArray[np.float64]

_LOG_GRID = math.log(GRID)
_OWN_WEIGHT = 15 / 16
_LEAST_LOG_WEIGHT = math.log(1e-4)
_SCALE = 1 << 62


@dataclass(frozen=True)
class SequenceEvidence:
    """The tests on every beginning of a text; entry t is the text up to its token t.

    Attributes
    ----------
    log_pvalue
        float64, shape (n,): of test "ump".
    log_martingale
        float64, shape (n,): the e-value of "ump"; -inf once every reading has met a real outside.
    n_inside
        Tokens before the first real outside, in the reading that lasts longest.
    """

    log_pvalue: Floats
    log_martingale: Floats
    n_inside: int


@dataclass(frozen=True)
class _Reading:
    """One way to cut the text so far into blocks.

    `own` is the interval of the present block as the detector's laws have it. `lowest` begins where the generator's may
    begin at the lowest and `highest` ends where it may end at the highest; low .. high - 1 is the widened interval.
    `widest` and `narrowest` bound the log of the generator's width over that of `own`. log_before is the log product of
    the lengths of the blocks before.
    """

    log_weight: float
    point: int
    own: Interval
    lowest: Interval
    highest: Interval
    low: int
    high: int
    log_before: float
    inside: bool
    widest: float = 0.0
    narrowest: float = 0.0
    log_length: float = 0.0
    log_rank: float = 0.0


def evidence(
    ids: npt.NDArray[np.integer[Any]],
    laws: Iterable[tuple[int, npt.NDArray[np.float32] | npt.NDArray[np.float64]]],
    points: Sequence[int],
    config: SequenceConfig,
    *,
    tolerance: float = 0.0,
) -> SequenceEvidence:
    """Follow a text block by block.

    Parameters
    ----------
    ids
        Integers, shape (n,): the text.
    laws
        The laws of its tokens in order and in pieces, as `ModelView.rows` gives them. A token without a law says
        nothing.
    points
        Shape (n + 1,): the real of the block that would begin at each place, from `sequence.reals`. The only input that
        depends on the key.
    config
        The key's settings.
    tolerance
        Largest difference between the generator's log-probabilities and these, in [0, 1].

    Raises
    ------
    ValueError
        If the tolerance is out of range, or an id is outside the laws.

    Notes
    -----
    O(V) a token, besides integers of 128 bits.
    """
    if not 0.0 <= tolerance <= 1.0:
        raise ValueError(f"tolerance must be in [0, 1], got {tolerance}.")
    text = np.asarray(ids)
    log_pvalue, log_martingale = np.zeros(len(text)), np.zeros(len(text))
    readings = [_begin(0.0, 0, points, 0.0, inside=True)]
    read = n_inside = 0
    for first, rows in laws:
        for place, row in enumerate(rows, first):
            token = int(text[place])
            if not 0 <= token < len(row):
                raise ValueError(f"ids must be in [0, {len(row)}), got {token}. Use the model's own tokenizer.")
            law = cumulated(row)
            part = int(law[token]), int(law[token + 1]), int(law[-1])
            moved = [_moved(reading, part, tolerance, place) for reading in readings]
            log_pvalue[place], log_martingale[place] = _summary(moved)
            if any(reading.inside for reading in moved):
                n_inside = place + 1
            readings = [new for reading in moved for new in _continued(reading, config.limit, place + 1, points)]
            read = place + 1
    if read:
        log_pvalue[read:], log_martingale[read:] = log_pvalue[read - 1], log_martingale[read - 1]
    return SequenceEvidence(log_pvalue, log_martingale, n_inside)


def _begin(log_weight: float, start: int, points: Sequence[int], log_before: float, *, inside: bool) -> _Reading:
    whole = Interval(start)
    return _Reading(
        log_weight=log_weight,
        point=points[start],
        own=whole,
        lowest=whole,
        highest=whole,
        low=0,
        high=GRID,
        log_before=log_before,
        inside=inside,
    )


def _moved(reading: _Reading, part: tuple[int, int, int], tolerance: float, place: int) -> _Reading:
    """The reading with one more token, whose share of the law is part = (weight before, weight up to it, total)."""
    before, after, total = part
    own = lowest = highest = reading.own.narrowed(before, after, total)
    low, high = own.low, own.low + own.width
    widest = narrowest = 0.0
    if tolerance > 0.0:
        down, up = math.exp(2.0 * tolerance), math.exp(-2.0 * tolerance)
        lowest = reading.lowest.narrowed(_shifted(before, total, down), _shifted(after, total, down), _SCALE)
        highest = reading.highest.narrowed(_shifted(before, total, up), _shifted(after, total, up), _SCALE)
        # Each token may round each end by one grid point; within a block the intervals stay nested.
        slack = 2 * (place + 1 - own.start)
        low = max(reading.low, min(lowest.low - slack, low))
        high = min(reading.high, max(highest.low + highest.width + slack, high))
        p = (after - before) / total
        widest, narrowest = -math.log(p + (1.0 - p) * up), -math.log(p + (1.0 - p) * down)
    point = reading.point
    inside = reading.inside and low <= point < high
    rank = 1
    if inside:
        # The detector's own interval comes first, then what widening added on the left, then on the right.
        if own.low <= point < own.low + own.width:
            rank = point - own.low + 1
        else:
            rank = own.low + own.width - point if point < own.low else point - low + 1
    return replace(
        reading,
        own=own,
        lowest=lowest,
        highest=highest,
        low=low,
        high=high,
        widest=reading.widest + widest,
        narrowest=reading.narrowest + narrowest,
        inside=inside,
        log_length=math.log(max(1, high - low)) - _LOG_GRID,
        log_rank=math.log(rank) - _LOG_GRID,
    )


def _shifted(part: int, total: int, factor: float) -> int:
    """S / (S + (1 - S) factor) of S = part / total, on a scale of 2**62."""
    share = part / total
    return min(_SCALE, int(share / (share + (1.0 - share) * factor) * _SCALE))


def _continued(reading: _Reading, limit: int, place: int, points: Sequence[int]) -> list[_Reading]:
    """The reading as it goes on after its token: in the same block, in a new one, or either."""
    own = reading.own
    over = own.width <= limit
    log_before = reading.log_before + reading.log_length
    after = _begin(reading.log_weight, place, points, log_before, inside=reading.inside)
    if limit == GRID or own.width == 0:
        return [after]
    surplus = math.log(own.width) - math.log(limit)
    if not reading.narrowest + surplus <= 0.0 < reading.widest + surplus:
        return [after if over else reading]
    own_weight, other_weight = math.log(_OWN_WEIGHT), math.log(1.0 - _OWN_WEIGHT)
    both = [
        replace(after, log_weight=after.log_weight + (own_weight if over else other_weight)),
        replace(reading, log_weight=reading.log_weight + (other_weight if over else own_weight)),
    ]
    # The text alone decides which readings are dropped; the weights then sum to less than one, which is as valid.
    return [one for one in both if one.log_weight >= _LEAST_LOG_WEIGHT]


def _summary(readings: Sequence[_Reading]) -> tuple[float, float]:
    """log p-value of "ump" and its log e-value."""
    hits = [one for one in readings if one.inside]
    if not hits:
        return 0.0, -math.inf
    log_p = min(one.log_before + one.log_rank - one.log_weight for one in hits)
    log_e = np.logaddexp.reduce([one.log_weight - one.log_before - one.log_length for one in hits])
    return min(0.0, log_p), float(log_e)


def sequence_test(
    text: Any,
    key: SecretKey,
    nonce: bytes,
    *,
    model: Any,
    prompt: Any = None,
    tokenizer: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    tolerance: float = 1e-4,
    test: Literal["auto", "ump", "prefix"] = "auto",
) -> TestResult:
    """Test whether a text is the one that a key, a nonce, a model and a prompt write.

    Guarantee: for a text written without knowledge of the key P(pvalue <= a) <= a, whatever the model, the prompt, the
    decoding rule and the tolerance; they decide the power alone. "ump" is uniformly most powerful for the verbatim
    text or a beginning of it. One changed token kills it, and ends what "prefix" can see.

    Parameters
    ----------
    text
        Token ids, shape (n,), or a string or UTF-8 bytes, whose ids must come out as they were generated.
    key
        Of scheme "sequence".
    nonce
        The text's, as given to `generate_sequence`.
    model, prompt, tokenizer, temperature, top_k, top_p, min_p
        As in `assay.detect`: the generator's, exactly.
    tolerance
        Largest difference between the generator's log-probabilities and those of this machine, in [0, 1]. 1e-4 covers
        float32 in batches of any size; half precision differs by 0.01 to 0.1.
    test
        "ump", "prefix", or "auto" for the better of the two, corrected for the choice.

    Returns
    -------
    TestResult; `statistic` is the number of tokens before the first real outside.

    Raises
    ------
    ValueError
        If the key is of another scheme, the nonce is short, or an argument is out of range.
    """
    from assay.detection.inputs import model_view_of, scorer_of, token_ids_of

    config = config_of(key)
    words = nonce_words(nonce)
    if test not in ("auto", *TESTS):
        raise ValueError(f"test must be 'auto', 'ump' or 'prefix', got {test!r}.")
    if model is None:
        raise ValueError("model must be given: without the laws of the tokens there are no intervals. Use 'default'.")
    if not 0.0 <= tolerance <= 1.0:
        raise ValueError(f"tolerance must be in [0, 1], got {tolerance}.")
    scorer = scorer_of(model)
    ids, _ = token_ids_of(text, "text", tokenizer, model, scorer)
    prompt_ids = None
    if prompt is not None:
        prompt_ids, _ = token_ids_of(prompt, "prompt", tokenizer, model, scorer)
    laws: Iterable[tuple[int, npt.NDArray[np.float32]]] = ()
    if len(ids):
        decoding = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        laws = model_view_of(scorer, ids, prompt_ids, decoding).rows()
    points = reals(use_key(key), words, np.arange(len(ids) + 1))
    found = evidence(ids, laws, points, config, tolerance=tolerance)
    results = {"ump": ump_result(found), "prefix": prefix_result(found)}
    chosen = best_of(list(results.values()), test="sequence-best-of-two") if test == "auto" else results[test]
    return replace(chosen, key_id=key.id, scheme=key.config.tag)


def ump_result(found: SequenceEvidence) -> TestResult:
    """The uniformly most powerful test; e-value: 1 / length of the intervals if all reals are inside, else 0."""
    n = len(found.log_pvalue)
    return _result(
        "sequence-ump",
        found,
        float(found.log_pvalue[-1]) if n else 0.0,
        float(found.log_martingale[-1]) if n else 0.0,
    )


def prefix_result(found: SequenceEvidence) -> TestResult:
    """The best beginning of the text; e-value: mean over all beginnings of theirs."""
    values = found.log_martingale
    mean = float(np.logaddexp.reduce(values)) - math.log(len(values)) if len(values) else 0.0
    return _result("sequence-prefix", found, -max(0.0, float(values.max(initial=0.0))), mean)


def _result(test: str, found: SequenceEvidence, log_pvalue: float, log_evalue: float) -> TestResult:
    return TestResult(
        test=test,
        statistic=float(found.n_inside),
        log_pvalue=log_pvalue,
        log_evalue=log_evalue,
        n_tokens=len(found.log_pvalue),
        n_scored=len(found.log_pvalue),
        null=NULL,
        alternative="greater",
        assumptions=ASSUMPTIONS,
    )
