"""hf-synthid: the tournament of transformers' `SynthIDTextWatermarkingConfig`; no torch needed.

The g-values are one public table T of N bits, read at key-shifted places: with s the low bits of the n-gram's hash,
g_l = T[(s + k_l) M + 1 mod N]. So a text is a set of states s, and under H0 each layer shows it at a uniform shift. The
real coin is the state: log2(N) bits. Reference: Dathathri et al. (2024), doi:10.1038/s41586-024-08025-4.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.watermark._coins import LogWeights, tilted_sampler
from assay.watermark.profiles._tournament import (
    MULTIPLIER,
    Bits,
    States,
    TournamentConfig,
    bit_columns,
    first_states,
    gram_states,
    hashes,
    layer_keys,
    new_contexts,
    tilted_rows,
)
from assay.watermark.schemes import Sampler, register

_FIRST = 1


@register
@dataclass(frozen=True, kw_only=True)
class HfSynthIdConfig(TournamentConfig):
    """Settings of transformers' `SynthIDTextWatermarkingConfig`; the key is its list `keys`.

    Attributes
    ----------
    ngram_len
        In [2, 64]: a token is keyed by the ngram_len - 1 generated tokens before it; before the first stand zeros.
    depth
        Layers, in [1, 64]: the number of keys, each an integer in [-2**63, 2**63).
    context_history_size
        A step whose context occurred among the last so many is left unmarked; >= 1.
    skip_first_ngram_calls
        Whether the first ngram_len - 1 generated tokens are left unmarked.
    sampling_table_size
        A power of two in [2, 2**24]. Keys matter modulo it only.
    sampling_table_seed
        Seeds the table; in [0, 2**32).
    """

    scheme: ClassVar[str] = "hf-synthid"
    version: ClassVar[int] = 1

    sampling_table_size: int = 2**16
    sampling_table_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        size, seed = self.sampling_table_size, self.sampling_table_seed
        if type(size) is not int or not 2 <= size <= 2**24 or size & (size - 1):
            # Other sizes are read by the signed 64-bit hash: keys are then no shifts, and no exact null law is known.
            raise ValueError(f"sampling_table_size must be a power of two in [2, 2**24], got {size!r}.")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ValueError(f"sampling_table_seed must be an integer in [0, 2**32), got {seed!r}.")


@functools.lru_cache(maxsize=2)
def sampling_table(size: int, seed: int) -> npt.NDArray[np.uint8]:
    """The public table T of g-values, shape (size,): low bits of successive draws of MT19937."""
    from assay.watermark.profiles import mersenne_numba

    raw = np.empty(size, dtype=np.uint32)
    mersenne_numba.draws(np.uint32(seed), raw)
    table = (raw & np.uint32(1)).astype(np.uint8)
    table.flags.writeable = False
    return table


@functools.lru_cache(maxsize=2)
def shifted_table(size: int, seed: int) -> npt.NDArray[np.uint8]:
    """T in the order of states: entry s is T[s M + 1 mod N], so that layer l of state s reads entry s + k_l mod N."""
    places = (np.arange(size, dtype=np.uint64) * MULTIPLIER + np.uint64(1)) % np.uint64(size)
    return sampling_table(size, seed)[places.astype(np.int64)]


@functools.lru_cache(maxsize=2)
def _packed_table(prf_key: bytes, config: HfSynthIdConfig) -> Bits:
    """The g-values of all layers of every state, one word each."""
    size = config.sampling_table_size
    table = shifted_table(size, config.sampling_table_seed)
    out = np.zeros(size, dtype=np.uint64)
    for layer, key in enumerate(layer_keys(np.frombuffer(prf_key, dtype=np.uint32))):
        out |= np.roll(table, -int(key % np.uint64(size))).astype(np.uint64) << np.uint64(layer)
    return out


def _bits(states: States, prf_key: Words, config: HfSynthIdConfig) -> Bits:
    packed = _packed_table(prf_key.tobytes(), config)
    return packed[(states & np.uint64(config.sampling_table_size - 1)).astype(np.int64)]


def scan(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: HfSynthIdConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Bits]:
    """Counted coins of documents that lie end to end.

    A token counts where the generator would have marked it (its context is not among the last
    `context_history_size`) and its state is new in its document.

    Parameters
    ----------
    ids
        uint32, shape (n,): generated tokens, no prompt.
    offsets
        int64, shape (documents + 1,).
    prf_key
        uint32, shape (2 depth,): from `keys.use_key`.
    config
        The key's settings.

    Returns
    -------
    positions
        int64, shape (k,), ascending, into `ids`.
    states
        int64, shape (k,), in [0, N): what the text asks the table for; a function of the text alone.
    bits
        uint64, shape (k,): bit l is the g-value in layer l.
    """
    grams, marked = gram_states(ids, offsets, config, _FIRST)
    states = grams & np.uint64(config.sampling_table_size - 1)
    positions = np.flatnonzero(first_states(states, marked, offsets))
    states = states[positions]
    return positions, states.astype(np.int64), _bits(states, prf_key, config)


def g_values(ids: Words, prf_key: Words, config: HfSynthIdConfig) -> npt.NDArray[np.uint8]:
    """g-values of every n-gram, as transformers' `compute_g_values` gives them.

    Returns
    -------
    uint8, shape (n - ngram_len + 1, depth), 0 or 1.
    """
    if len(ids) < config.ngram_len:
        return np.empty((0, config.depth), dtype=np.uint8)
    return bit_columns(_bits(hashes(ids, config.ngram_len, _FIRST), prf_key, config), config.depth)


def context_mask(ids: Words, config: HfSynthIdConfig) -> npt.NDArray[np.bool_]:
    """Which n-grams have a context that is not repeated, as transformers' `compute_context_repetition_mask` says."""
    lead = config.ngram_len - 1
    if len(ids) <= lead:
        return np.empty(0, dtype=np.bool_)
    contexts = hashes(ids[:-1], lead, _FIRST)
    return new_contexts(contexts, np.array([0, len(contexts)], dtype=np.int64), config.context_history_size)


def official_scores(
    ids: Words, prf_key: Words, config: HfSynthIdConfig, *, eos_token_id: int | None = None
) -> tuple[int, float, float]:
    """Tokens scored, mean and weighted mean of their g-values under the official masks; scores, not p-values.

    Parameters
    ----------
    ids
        uint32, shape (n,): generated tokens. The first ngram_len - 1 are dropped, as there.
    eos_token_id
        Tokens from the first end of sequence on are left out.

    Returns
    -------
    (n_scored, mean, weighted mean); the means are NaN where nothing is scored. The weights fall evenly from 10 to 1.
    """
    counted = context_mask(ids, config)
    if eos_token_id is not None:
        ended = np.flatnonzero(ids == eos_token_id)
        if len(ended):
            counted &= np.arange(len(counted)) + config.ngram_len - 1 < ended[0]
    n = int(np.sum(counted))
    if n == 0:
        return 0, float("nan"), float("nan")
    bits = _bits(hashes(ids, config.ngram_len, _FIRST)[counted], prf_key, config)
    layers = np.array([np.mean((bits >> np.uint64(layer)) & np.uint64(1)) for layer in range(config.depth)])
    weights = np.linspace(10.0, 1.0, config.depth)
    return n, float(np.mean(layers)), float(np.sum(layers * weights) / np.sum(weights))


def tilted_log_weights(
    ids: npt.NDArray[np.int64],
    log_weights: LogWeights,
    pad_token_id: int | None,
    prf_key: Words,
    config: HfSynthIdConfig,
) -> npt.NDArray[np.float64]:
    """log of the law after the tournament, for rows of GENERATED tokens (possibly none); see `schemes.Sampler`."""
    bits_of = partial(_bits, prf_key=prf_key, config=config)
    return tilted_rows(ids, log_weights, pad_token_id, config, first=_FIRST, bits_of=bits_of)


def sampler(prf_key: Words, config: HfSynthIdConfig, unmarked: Words) -> Sampler:
    """See `schemes.Sampler`; `ids` are the generated tokens alone. The noise is keyed by them all."""
    return tilted_sampler(partial(tilted_log_weights, prf_key=prf_key, config=config), unmarked)
