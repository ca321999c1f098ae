"""Inverse-transform watermark, keyed by context: one uniform U picks the token on a secretly permuted line.

Per context the PRF gives a permutation pi of the vocabulary (order of PRF words) and one U; the token is the first in
pi's order with cumulative probability >= U. Law of the text: exactly the model's, over keys. Under H0 U and the token's
own word W are independent and uniform; under H1 they agree. Reference: Kuditipudi, Thickstun, Hashimoto and Liang
(2023), arXiv:2307.15593, section 2.3, there with a key sequence instead of contexts.
pi uses PRF stream 0, candidate v; U uses stream 1 << 24, candidate 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark import gumbel
from assay.watermark.schemes import Sampler, SchemeConfig, register

_UNIFORM = 1 << 24


@register
@dataclass(frozen=True, kw_only=True)
class InverseTransformConfig(SchemeConfig):
    """Settings of the inverse-transform watermark.

    Attributes
    ----------
    window
        Context width h, in [1, 64]; see `GumbelConfig`.
    """

    scheme: ClassVar[str] = "inverse-transform"
    version: ClassVar[int] = 1

    window: int = 4

    def __post_init__(self) -> None:
        gumbel.GumbelConfig(window=self.window)  # the same range, the same message


@dataclass(frozen=True)
class InversePivots:
    """What a document shows under one key.

    Attributes
    ----------
    positions
        int64, shape (k,), ascending: the tokens that count. U belongs to the context, so each context counts once, at
        its first place.
    uniforms
        uint32, shape (k,): the word of U in each context.
    places
        uint32, shape (k,): the word of the token, by which pi orders the vocabulary; as a fraction of 2^32, about the
        token's place in pi. Both words are independent and uniform under the null.
    n_tokens, n_repeats_dropped
        As `gumbel.Pivots`.
    """

    positions: npt.NDArray[np.int64]
    uniforms: Words
    places: Words
    n_tokens: int
    n_repeats_dropped: int


def sampler(prf_key: Words, config: InverseTransformConfig, unmarked: Words) -> Sampler:
    """See `schemes.sampler_of`.

    Guarantee: over keys the text has the model's law, up to 2^-32 per id. A token is marked where
    `gumbel.marked_context` gives a context.
    """

    def draw(
        ids: npt.NDArray[np.int64],
        log_weights: npt.NDArray[np.float32] | npt.NDArray[np.float64],
        pad_token_id: int | None,
    ) -> npt.NDArray[np.int64]:
        from assay.kernels import race

        pad = -1 if pad_token_id is None else pad_token_id
        tokens = np.empty(len(ids), dtype=np.int64)
        for row, history in enumerate(ids):
            context = gumbel.marked_context(gumbel.real_history(history, pad), config.window)
            if context is None:
                whole = gumbel._whole_history(history, pad)[None]
                tokens[row] = race.winners(race.subkeys(unmarked, whole), log_weights[row : row + 1])[0]
            else:
                tokens[row] = _inverted(prf_key, context[None], log_weights[row])
        return tokens

    return draw


def uniform_words(prf_key: Words, contexts: Words, *, backend: prf.Backend = "auto") -> Words:
    """The word of U in each context: uint32, shape (n,). contexts: uint32, shape (n, h)."""
    return prf.words_at(prf_key, contexts, np.zeros(len(contexts), dtype=np.uint32), stream=_UNIFORM, backend=backend)


def _inverted(prf_key: Words, context: Words, log_weights: npt.NDArray[np.floating]) -> int:
    """The first token in pi's order whose cumulative probability reaches U."""
    allowed = np.flatnonzero(log_weights > -np.inf)
    peak = float(log_weights.max(initial=-np.inf))
    if not np.isfinite(peak) or np.isnan(log_weights).any():
        raise ValueError("log_weights must be finite or -inf with a finite largest value in each row.")
    words = prf.expand(prf_key, context, len(log_weights), backend="numba")[0, allowed]
    mass = np.exp(log_weights[allowed].astype(np.float64) - peak)
    # Only the part of the line where U falls is put in order: sorting it all costs ten times the rest.
    part = words >> np.uint32(20)
    reached = np.cumsum(np.bincount(part, weights=mass))
    u = (float(uniform_words(prf_key, context, backend="numba")[0]) + 0.5) * 2.0**-32
    target = u * float(reached[-1])
    chosen = int(np.searchsorted(reached, target))
    inside = np.flatnonzero(part == chosen)
    # Stable: equal words stand in the order of their ids, as the detector assumes.
    inside = inside[np.argsort(words[inside], kind="stable")]
    walked = np.cumsum(mass[inside]) + (reached[chosen - 1] if chosen else 0.0)
    # Sums in another order may end a rounding short of the target.
    return int(allowed[inside[min(int(np.searchsorted(walked, target)), len(inside) - 1)]])


def observe(
    ids: Words, prf_key: Words, config: InverseTransformConfig, *, prompt_length: int = 0, backend: prf.Backend = "auto"
) -> InversePivots:
    """The words of a text's tokens and contexts, repeated contexts dropped; the prompt gives context only.

    Parameters
    ----------
    ids
        uint32, shape (n,): prompt and text.
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    config
        The key's settings.
    prompt_length
        How many of the ids are the prompt, in [0, n]; positions are counted from the first token after it.
    """
    offsets = np.array([0, len(ids)], dtype=np.int64)
    positions, uniforms, places = scan(ids, offsets, prf_key, config, backend=backend)
    counted, n_text, n_dropped = gumbel.after_prompt(positions, len(ids), prompt_length, config.window)
    return InversePivots(positions[counted] - prompt_length, uniforms[counted], places[counted], n_text, n_dropped)


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: InverseTransformConfig,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], Words, Words]:
    """Counted positions, words of U and words of the tokens, for many documents that lie end to end."""
    after = np.flatnonzero(first_occurrences(ids, offsets, config.window)) + 1
    positions = after[~np.isin(after, offsets)]  # a document's last context is followed by nothing
    places = prf.words_of(prf_key, ids, positions, config.window, backend=backend)
    if len(positions) == 0:
        return positions, places, places
    # U's candidate is the same in all contexts: an id 0 put in place of each token would need a copy of the contexts.
    contexts = np.lib.stride_tricks.sliding_window_view(ids, config.window)
    uniforms = np.empty(len(positions), dtype=np.uint32)
    step = 1 << 16
    for start in range(0, len(positions), step):
        chosen = positions[start : start + step] - config.window
        uniforms[start : start + step] = uniform_words(prf_key, contexts[chosen], backend=backend)
    return positions, uniforms, places
