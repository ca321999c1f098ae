"""synthid-text: the tournament of Google DeepMind's reference package since its hash has no table (June 2025).

Under H0 each layer's bit of an n-gram is a fair coin, as far as the keyed hash (64-bit congruential steps, 12 rounds of
them with shifts after each key) behaves as a random function. The real coin is the n-gram's 64-bit hash.
Reference: Dathathri et al. (2024), doi:10.1038/s41586-024-08025-4; google-deepmind/synthid-text at addb4a1.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.watermark._coins import plain_subkeys
from assay.watermark.profiles._tournament import (
    Bits,
    LogWeights,
    States,
    TournamentConfig,
    first_states,
    hashes,
    layer_keys,
    new_contexts,
    padded,
    real_history,
    tournament_law,
    usable,
)
from assay.watermark.schemes import Sampler, register

_MULTIPLIER = np.uint64(6364136223846793005)


@register
@dataclass(frozen=True, kw_only=True)
class SynthIdTextConfig(TournamentConfig):
    """Settings of synthid-text's `SynthIDLogitsProcessor`; the key is its list `keys`.

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
    num_leaves
        Tokens that compete in each match: 2, which keeps the model's law over keys, up to 8, which does not. For
        writing only.
    """

    scheme: ClassVar[str] = "synthid-text"
    version: ClassVar[int] = 1

    num_leaves: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.num_leaves) is not int or not 2 <= self.num_leaves <= 8:
            raise ValueError(f"num_leaves must be an integer in [2, 8], got {self.num_leaves!r}.")


def initial_state(prf_key: Words) -> int:
    """Where hashing begins: SHA-256 of the keys as 64-bit little-endian words, read big-endian, modulo 2**63 - 1."""
    digest = hashlib.sha256(np.ascontiguousarray(prf_key).astype("<u4").tobytes()).digest()
    return int.from_bytes(digest, "big") % (2**63 - 1)


def _bits(states: States, prf_key: Words) -> Bits:
    from assay.watermark.profiles import hashes_numba

    out = np.empty(len(states), dtype=np.uint64)
    hashes_numba.layer_bits(states, layer_keys(prf_key), out)
    return out


def scan(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: SynthIdTextConfig
) -> tuple[npt.NDArray[np.int64], Bits]:
    """Counted coins of documents that lie end to end; arguments as `hf_synthid.scan`.

    Returns
    -------
    positions
        int64, shape (k,), ascending, into `ids`.
    bits
        uint64, shape (k,): bit l is the g-value in layer l.
    """
    long, moved = padded(ids, offsets, config)
    lead = config.ngram_len - 1
    if not len(ids):
        return moved, np.empty(0, dtype=np.uint64)
    start = initial_state(prf_key)
    states = hashes(long, config.ngram_len, start)[moved - lead]
    contexts = hashes(long, lead, start)[moved - lead]
    eligible = new_contexts(contexts, offsets, config.context_history_size)
    if config.skip_first_ngram_calls:
        eligible &= np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets)) >= lead
    positions = np.flatnonzero(first_states(states, eligible, offsets))
    return positions, _bits(states[positions], prf_key)


def g_values(ids: Words, prf_key: Words, config: SynthIdTextConfig) -> npt.NDArray[np.uint8]:
    """g-values of every n-gram, as synthid-text's `compute_g_values` gives them.

    Returns
    -------
    uint8, shape (n - ngram_len + 1, depth), 0 or 1.
    """
    if len(ids) < config.ngram_len:
        return np.empty((0, config.depth), dtype=np.uint8)
    bits = _bits(hashes(ids, config.ngram_len, initial_state(prf_key)), prf_key)
    return ((bits[:, None] >> np.arange(config.depth, dtype=np.uint64)) & np.uint64(1)).astype(np.uint8)


def tilted_log_weights(
    ids: npt.NDArray[np.int64],
    log_weights: LogWeights,
    pad_token_id: int | None,
    prf_key: Words,
    config: SynthIdTextConfig,
) -> npt.NDArray[np.float64]:
    """log of the law after the tournament, for rows of GENERATED tokens (possibly none); see `schemes.Sampler`."""
    pad = -1 if pad_token_id is None else pad_token_id
    lead = config.ngram_len - 1
    out = log_weights.astype(np.float64)
    every = np.arange(log_weights.shape[1], dtype=np.uint64)
    start = initial_state(prf_key)
    for row, weights in zip(ids, out, strict=True):
        history = real_history(row, pad)
        if not usable(weights) or (config.skip_first_ngram_calls and len(history) < lead):
            continue
        contexts = hashes(np.concatenate([np.zeros(lead, dtype=np.uint32), history]), lead, start)
        offsets = np.array([0, len(contexts)], dtype=np.int64)
        if new_contexts(contexts, offsets, config.context_history_size)[-1]:
            open_ids = np.flatnonzero(weights > -np.inf)
            states = (contexts[-1] + every[open_ids]) * _MULTIPLIER + np.uint64(1)
            bits = _bits(states, prf_key)
            weights[open_ids] = tournament_law(weights[open_ids], bits, config.depth, config.num_leaves)
    return out


def sampler(prf_key: Words, config: SynthIdTextConfig, unmarked: Words) -> Sampler:
    """See `schemes.Sampler`; `ids` are the generated tokens alone. The noise is keyed by them all."""
    from assay.kernels import race

    def draw(ids: npt.NDArray[np.int64], log_weights: LogWeights, pad_token_id: int | None) -> npt.NDArray[np.int64]:
        tilted = tilted_log_weights(ids, log_weights, pad_token_id, prf_key, config)
        return race.winners(plain_subkeys(ids, -1 if pad_token_id is None else pad_token_id, unmarked), tilted)

    return draw
