"""Which part of a document is marked: segments with a family-wise level, one p-value for "some part is", a posterior.

Each segment has an e-value; those of a fixed family share the level by weights (Bonferroni for e-values), and their
weighted mean, with that of all segments, is the scan's e-value. Reference: Vovk and Wang (2021), arXiv:1912.06116;
Arias-Castro, Donoho and Huo (2005) for the family; Rabiner (1989) for forward-backward. Proofs:
docs/explanation/tests-and-null-laws.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.detection.evidence import Counts, Evidence, Floats, gather, window_of
from assay.detection.gumbel import MODEL_ASSUMPTIONS
from assay.detection.inputs import model_view_of, scorer_of, token_ids_of
from assay.detection.result import TestResult, evalue_result
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark.keys import SecretKey, use_key

NULL = "no token of the text was drawn with the key"
ASSUMPTIONS = (
    "The key was secret: whoever wrote the unmarked tokens could not compute its PRF.",
    "Tokens count whose context occurs once in the document; the mark used no unmarked token's context elsewhere.",
)
SHARED_COINS = (
    ASSUMPTIONS[0],
    "Tokens count whose coin occurs once in the document; no unmarked token was taken from another marked text.",
)
SHORTEST = 4
"""Counted tokens of the shortest segments of the family."""


@dataclass(frozen=True)
class Segment:
    """A part of the text in which marked tokens were found.

    Attributes
    ----------
    start, stop
        Token indices into the text, half open: from the first to the last counted token of the segment.
    log_evalue
        Natural logarithm of the segment's own e-value.
    log_pvalue
        Natural logarithm of its p-value, corrected for all segments of the family.
    """

    start: int
    stop: int
    log_evalue: float
    log_pvalue: float


@dataclass(frozen=True)
class Localisation:
    """Where a document is marked.

    Attributes
    ----------
    segments
        Disjoint, in order of the text. Guarantee: the probability that any of them holds no marked token is at most
        `level`.
    posterior
        float64, shape (n_tokens,): probability of each token being marked under a two-state hidden Markov model; a
        picture, not a test.
    result
        The test that some part is marked.
    level
        The family-wise level of the segments.
    """

    segments: tuple[Segment, ...]
    posterior: Floats
    result: TestResult
    level: float


def localise(
    text: str | bytes | npt.ArrayLike,
    key: SecretKey,
    *,
    level: float = 0.01,
    tokenizer: Any = None,
    model: Any = None,
    prompt: str | bytes | npt.ArrayLike | None = None,
    run_length: float = 100.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Localisation:
    """Find the marked parts of a document.

    Guarantee: P(result.pvalue <= a) <= a if no token is marked; and whatever is marked, the probability that a reported
    segment holds no marked token at all is at most `level`. Both for every text, and for any model.

    Parameters
    ----------
    text
        A string, UTF-8 bytes, or token ids, shape (n,).
    key
        A key of one of the schemes of `StreamingTest`.
    level
        In (0, 1).
    tokenizer, model, prompt, temperature, top_k, top_p, min_p
        As in `detect`; a model serves the schemes that are model-aware in `StreamingTest`.
    run_length
        Expected tokens between changes from marked to plain or back, for the posterior; above 1.

    Returns
    -------
    Localisation

    Raises
    ------
    ValueError
        If level or run_length is out of range, the scheme is another, or a model is given that it has no use for.

    Notes
    -----
    O(n log n) time. A token counts only if its context occurs once in the document, so that no word which decided a
    marked token is counted for an unmarked one; in repetitive texts and for narrow windows few tokens are left. With a
    fixed list or seeding "self", where many contexts share a coin, it is the coin that must occur once.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level}.")
    if not 1.0 < run_length < math.inf:
        raise ValueError(f"run_length must be a finite number above 1, got {run_length}.")
    window_of(key.config)  # refuses other schemes before any model is loaded
    scorer = None if model is None else scorer_of(model)
    ids, _ = token_ids_of(text, "text", tokenizer, model, scorer)
    prompt_ids = None if prompt is None else token_ids_of(prompt, "prompt", tokenizer, model, scorer)[0]
    log_prob = None
    if scorer is not None:
        decoding = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        log_prob = model_view_of(scorer, ids, prompt_ids, decoding).log_prob if len(ids) else np.empty(0)
    whole = ids if prompt_ids is None else np.concatenate([prompt_ids, ids])
    before = len(whole) - len(ids)
    prf_key = use_key(key)
    found = gather(whole, prf_key, key.config, prompt_length=before, log_prob=log_prob)
    found = of_lone_coins(found, whole, before, prf_key, key.config)
    log_evalue, segments = scan(found, level)
    assumptions: tuple[str, ...] = SHARED_COINS if coins_are_shared(key.config) else ASSUMPTIONS
    if model is not None:
        assumptions = (*assumptions, MODEL_ASSUMPTIONS[-1])
    result = evalue_result(f"{key.config.scheme}-scan", log_evalue, found, null=NULL, assumptions=assumptions)
    result = replace(result, key_id=key.id, scheme=key.config.tag)
    return Localisation(segments, posterior(found, run_length), result, level)


def coins_are_shared(config: Any) -> bool:
    """Whether one coin serves many contexts: a fixed list, or a green list with seeding "self"."""
    return config.scheme == "fixed-list" or getattr(config, "seeding", "left") == "self"


def of_lone_coins(found: Evidence, ids: Words, prompt_length: int, prf_key: Words, config: Any) -> Evidence:
    """The evidence of tokens that may count for the place where they stand.

    Those whose context occurs once among the ids; where contexts share coins, those whose coin occurs once.
    """
    if not coins_are_shared(config):
        return of_lone_contexts(found, ids, prompt_length, config.window)
    places = found.positions + prompt_length
    if config.scheme == "fixed-list":
        return _kept(found, _occur_once(ids, 1)[places])
    from assay.watermark.green_list import anchors_of

    if len(ids) <= config.window:
        return found  # no token has a coin
    contexts = np.lib.stride_tricks.sliding_window_view(ids, config.window)[:-1]
    tokens = ids[config.window :]
    coins = (anchors_of(contexts, tokens, prf_key).astype(np.uint64) << np.uint64(32)) | tokens
    _, which, counts = np.unique(coins, return_inverse=True, return_counts=True)
    return _kept(found, counts[which][places - config.window] == 1)


def of_lone_contexts(found: Evidence, ids: Words, prompt_length: int, window: int) -> Evidence:
    """The evidence of tokens whose context occurs once among the ids."""
    return _kept(found, _occur_once(ids, window)[found.positions + prompt_length - 1])


def _occur_once(ids: Words, window: int) -> npt.NDArray[np.bool_]:
    """Whether the `window` ids that end at each place occur once among all ids."""
    offsets = np.array([0, len(ids)], dtype=np.int64)
    # Both flags stand at the last token of a context; in the reversed text that is its first.
    first = first_occurrences(ids, offsets, window)
    last = np.zeros(len(ids), dtype=np.bool_)
    if len(ids) >= window:
        last[window - 1 :] = first_occurrences(np.ascontiguousarray(ids[::-1]), offsets, window)[::-1][
            : 1 - window or None
        ]
    once: npt.NDArray[np.bool_] = first & last
    return once


def _kept(found: Evidence, kept: npt.NDArray[np.bool_]) -> Evidence:
    return replace(
        found,
        positions=found.positions[kept],
        log_ratios=found.log_ratios[kept],
        n_repeats_dropped=found.n_repeats_dropped + int(np.sum(~kept)),
    )


def family(n: int) -> Iterator[tuple[Counts, int]]:
    """Starts and length of the segments of n counted tokens: lengths 4, 5, 6, 7, 8, 10, ..., at steps of an eighth.

    Any segment of at least 4 tokens holds one of the family with more than 0.6 of its tokens. O(n) segments.
    """
    length = SHORTEST
    while length <= n:
        starts = np.arange(0, n - length + 1, max(1, length // 8), dtype=np.int64)
        if starts[-1] != n - length:
            starts = np.append(starts, n - length)
        yield starts, length
        length += max(1, length // 4)


def scan(found: Evidence, level: float) -> tuple[float, tuple[Segment, ...]]:
    """The scan's log e-value, and the segments that hold marked tokens at a family-wise level.

    Parameters
    ----------
    found
        Evidence of the counted tokens.
    level
        In (0, 1).
    """
    n, alternatives = found.log_ratios.shape
    if n < SHORTEST:
        return 0.0, ()
    sums = np.concatenate([np.zeros((1, alternatives)), np.cumsum(found.log_ratios, axis=0)])
    pieces = list(family(n))
    starts = np.concatenate([first for first, _ in pieces])
    stops = np.concatenate([first + length for first, length in pieces])
    log_e = np.concatenate([_log_mean(sums[first + length] - sums[first]) for first, length in pieces])
    # Each length has the same weight, shared by its segments; all weights sum to 1.
    log_w = np.concatenate([np.full(len(first), -math.log(len(pieces) * len(first))) for first, _ in pieces])
    weighted = log_w + log_e
    # Half the weight on the family, half on all n (n + 1) / 2 segments alike.
    together = np.logaddexp(np.logaddexp.reduce(weighted), log_mean_of_all_segments(sums)) - math.log(2.0)
    chosen: list[int] = []
    rejected = np.flatnonzero(weighted >= -math.log(level))
    taken = np.zeros(n + 1, dtype=np.int64)
    for index in rejected[np.argsort(-weighted[rejected], kind="stable")].tolist():
        if not taken[starts[index] : stops[index]].any():
            taken[starts[index] : stops[index]] = 1
            chosen.append(index)
    chosen.sort(key=lambda index: int(starts[index]))
    segments = tuple(
        Segment(
            start=int(found.positions[starts[i]]),
            stop=int(found.positions[stops[i] - 1]) + 1,
            log_evalue=float(log_e[i]),
            log_pvalue=min(0.0, float(-weighted[i])),
        )
        for i in chosen
    )
    return float(together), segments


def log_mean_of_all_segments(sums: Floats) -> float:
    """log of the mean over all segments (a, b] and alternatives of exp(sums_b - sums_a), in one pass.

    The sum over a is the recursion R_b = (1 + R_{b-1}) exp(sums_b - sums_{b-1}) of Shiryaev and Roberts.

    Parameters
    ----------
    sums
        float64, shape (n + 1, alternatives): cumulative log ratios, first row 0.
    """
    n = len(sums) - 1
    began = np.logaddexp.accumulate(-sums[:-1], axis=0)
    total = np.logaddexp.reduce((sums[1:] + began).ravel())
    return float(total) - math.log(n * (n + 1) / 2 * sums.shape[1])


def posterior(found: Evidence, run_length: float) -> Floats:
    """Probability that each token is marked: two-state hidden Markov model, forward-backward in log space.

    Both states last `run_length` tokens on average and are equally likely at first. A token that does not count says
    nothing. Alternatives are averaged with the weights that the whole text gives them.

    Parameters
    ----------
    found
        Evidence of the counted tokens.
    run_length
        Above 1.

    Returns
    -------
    float64, shape (n_tokens,).
    """
    n, alternatives = found.n_tokens, found.log_ratios.shape[1]
    ratios = np.zeros((n, alternatives))
    ratios[found.positions] = found.log_ratios
    stay, move = math.log1p(-1.0 / run_length), -math.log(run_length)
    # Log weights of everything up to token t, (plain, marked); only their difference and scale matter.
    forward = np.empty((n, 2, alternatives))
    plain = marked = np.full(alternatives, math.log(0.5))
    for t in range(n):
        if t:
            plain, marked = (
                np.logaddexp(plain + stay, marked + move),
                np.logaddexp(marked + stay, plain + move),
            )
        marked = marked + ratios[t]
        forward[t] = plain, marked
    if n == 0:
        return np.empty(0)
    log_text = np.logaddexp(plain, marked)
    weights = np.exp(log_text - np.logaddexp.reduce(log_text))
    out = np.empty(n)
    plain = marked = np.zeros(alternatives)
    for t in range(n - 1, -1, -1):
        odds = (forward[t, 1] + marked) - (forward[t, 0] + plain)
        out[t] = float(weights @ (0.5 * (1.0 + np.tanh(0.5 * odds))))
        seen = marked + ratios[t]
        plain, marked = np.logaddexp(plain + stay, seen + move), np.logaddexp(seen + stay, plain + move)
    return out


def _log_mean(log_values: Floats) -> Floats:
    """log of the mean of exp over the last axis."""
    out: Floats = np.logaddexp.reduce(log_values, axis=-1) - math.log(log_values.shape[-1])
    return out
