"""synthid-text: the tournament of Google DeepMind's reference package since its hash has no table (June 2025).

Under H0 each layer's bit of an n-gram is a fair coin, as far as the keyed hash (64-bit congruential steps, 12 rounds of
them with shifts after each key) behaves as a random function. The real coin is the n-gram's 64-bit hash.
Reference: Dathathri et al. (2024), doi:10.1038/s41586-024-08025-4; google-deepmind/synthid-text at addb4a1.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.watermark._coins import LogWeights, tilted_sampler
from assay.watermark.profiles._tournament import (
    Bits,
    States,
    TournamentConfig,
    bit_columns,
    first_states,
    gram_states,
    hashes,
    layer_keys,
    tilted_rows,
)
from assay.watermark.schemes import Sampler, register


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
    states, marked = gram_states(ids, offsets, config, initial_state(prf_key))
    positions = np.flatnonzero(first_states(states, marked, offsets))
    return positions, _bits(states[positions], prf_key)


def g_values(ids: Words, prf_key: Words, config: SynthIdTextConfig) -> npt.NDArray[np.uint8]:
    """g-values of every n-gram, as synthid-text's `compute_g_values` gives them.

    Returns
    -------
    uint8, shape (n - ngram_len + 1, depth), 0 or 1.
    """
    if len(ids) < config.ngram_len:
        return np.empty((0, config.depth), dtype=np.uint8)
    return bit_columns(_bits(hashes(ids, config.ngram_len, initial_state(prf_key)), prf_key), config.depth)


def tilted_log_weights(
    ids: npt.NDArray[np.int64],
    log_weights: LogWeights,
    pad_token_id: int | None,
    prf_key: Words,
    config: SynthIdTextConfig,
) -> npt.NDArray[np.float64]:
    """log of the law after the tournament, for rows of GENERATED tokens (possibly none); see `schemes.Sampler`."""
    start, bits_of = initial_state(prf_key), partial(_bits, prf_key=prf_key)
    return tilted_rows(ids, log_weights, pad_token_id, config, first=start, bits_of=bits_of, leaves=config.num_leaves)


def sampler(prf_key: Words, config: SynthIdTextConfig, unmarked: Words) -> Sampler:
    """See `schemes.Sampler`; `ids` are the generated tokens alone. The noise is keyed by them all."""
    return tilted_sampler(partial(tilted_log_weights, prf_key=prf_key, config=config), unmarked)
