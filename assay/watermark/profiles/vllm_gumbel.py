"""vllm-gumbel: vLLM's native Gumbel watermark, PRF philox4x32-10-v1, with one key or two; no torch needed.

Under H0 the word of each token in a context seen for the first time is uniform, independently: -log(1 - u) is Exp(1).
The real coin is the context: the last w GENERATED tokens, filled with -1 on the left; the prompt takes no part.
Reference: Aaronson (2022); Salmon et al. (2011), doi:10.1145/2063384.2063405; vLLM `vllm/v1/watermarking`, 2026.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark._coins import LogWeights, plain_subkeys
from assay.watermark.foreign import ForeignConfig, as_integers
from assay.watermark.gumbel import real_history
from assay.watermark.schemes import Sampler, register

Uniforms = npt.NDArray[np.float32]

_NONE = 0xFFFFFFFF  # the id -1 as a word


@register
@dataclass(frozen=True, kw_only=True)
class VllmGumbelConfig(ForeignConfig):
    """Settings of vLLM's `WatermarkConfig`; the key is its 64-bit integer `key`.

    Attributes
    ----------
    algorithm
        "gumbel": one key. "dual_key_gumbel": two, derived from the one; each token is marked with either.
    context_width
        In [1, 64]: generated tokens that key the noise.
    alpha
        In (0, 1), for two keys: how often key B marks when writing, and the weight of its scores when reading.
    """

    scheme: ClassVar[str] = "vllm-gumbel"
    version: ClassVar[int] = 1
    completion_only: ClassVar[bool] = True

    algorithm: Literal["gumbel", "dual_key_gumbel"] = "gumbel"
    context_width: int = 4
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.algorithm not in ("gumbel", "dual_key_gumbel"):
            raise ValueError(f"algorithm must be 'gumbel' or 'dual_key_gumbel', got {self.algorithm!r}.")
        width, alpha = self.context_width, self.alpha
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 64:
            raise ValueError(f"context_width must be an integer in [1, 64], got {width!r}.")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha must be a number in (0, 1), got {alpha!r}. With one key use algorithm='gumbel'.")


def subkeys(prf_key: Words, config: VllmGumbelConfig) -> tuple[int, ...]:
    """The 64-bit Philox keys: the key itself, or A and B by SHA-256."""
    (key,) = as_integers(prf_key)
    if config.algorithm == "gumbel":
        return (key,)
    digests = (hashlib.sha256(name + key.to_bytes(8, "big")).digest() for name in (b"key_a", b"key_b"))
    return tuple(int.from_bytes(digest[:8], "big") for digest in digests)


def _halves(key: int) -> tuple[np.uint32, np.uint32]:
    return np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)


def raw_words(contexts: Words, tokens: Words, key: int) -> Words:
    """Philox words of tokens after contexts.

    Parameters
    ----------
    contexts
        uint32, shape (n, w); 0xFFFFFFFF where there is no token.
    tokens
        uint32, shape (n,).
    key
        64-bit Philox key.
    """
    from assay.watermark.profiles import hashes_numba

    out = np.empty(len(tokens), dtype=np.uint32)
    hashes_numba.philox_at(np.ascontiguousarray(contexts), tokens, *_halves(key), out)
    return out


def uniforms(words: Words) -> Uniforms:
    """vLLM's float32 uniforms: (upper 24 bits + 1) / (2**24 + 1)."""
    values: Uniforms = (((words >> np.uint32(8)) + 1.0) / (2**24 + 1.0)).astype(np.float32)
    return values


def race_words(words: Words) -> Words:
    """The words in the orientation of `gumbel.sum_scores` and `race_scores`: small for marked tokens.

    With m the upper 24 bits, P(m or larger) = (2**24 - m) / 2**24 under the null; the word returned, x, has
    (x + 1) / 2**32 equal to that, so both scores are taken at the conservative edge of the cell.
    """
    return ~words | np.uint32(0xFF)


def scan(
    ids: Words, offsets: npt.NDArray[np.int64], prf_key: Words, config: VllmGumbelConfig
) -> tuple[npt.NDArray[np.int64], list[Words]]:
    """First places of the distinct contexts of documents end to end, and the words shown there.

    Parameters
    ----------
    ids
        uint32, shape (n,): generated tokens, no prompt.
    offsets
        int64, shape (documents + 1,).
    prf_key
        uint32, shape (2,): from `keys.use_key`.
    config
        The key's settings.

    Returns
    -------
    positions
        int64, shape (k,), ascending, into `ids`.
    words
        One uint32 array of shape (k,) for each key.
    """
    width = config.context_width
    if not len(ids):
        return np.empty(0, dtype=np.int64), [np.empty(0, dtype=np.uint32) for _ in subkeys(prf_key, config)]
    moved = np.arange(len(ids)) + width * np.repeat(np.arange(1, len(offsets)), np.diff(offsets))
    long = np.full(len(ids) + width * (len(offsets) - 1), _NONE, dtype=np.uint32)
    long[moved] = ids
    starts = offsets + width * np.arange(len(offsets), dtype=np.int64)
    # A context is the n-gram that ends one place before its token; the document's last n-gram is no context.
    new = first_occurrences(long, starts, width)[moved - 1]
    positions = np.flatnonzero(new)
    contexts = np.lib.stride_tricks.sliding_window_view(long, width)[moved[positions] - width]
    return positions, [raw_words(contexts, ids[positions], key) for key in subkeys(prf_key, config)]


def official_scores(ids: Words, prf_key: Words, config: VllmGumbelConfig) -> tuple[int, float]:
    """Tokens scored and score as vLLM's detector gives them, with its weights for two keys; not a p-value."""
    _, words = scan(ids, np.array([0, len(ids)], dtype=np.int64), prf_key, config)
    scores = [-np.log1p(-uniforms(one).astype(np.float64)) for one in words]
    if len(scores) == 1:
        return len(scores[0]), float(np.sum(scores[0]))
    return len(scores[0]), float(np.sum((1.0 - config.alpha) * scores[0] + config.alpha * scores[1]))


def next_token(context: Words, weights: LogWeights, key: int) -> int:
    """argmax log p - log(-log u) over one row; ties go to the lowest id."""
    from assay.watermark.profiles import hashes_numba

    words = np.empty(len(weights), dtype=np.uint32)
    hashes_numba.philox_row(context, *_halves(key), words)
    u = uniforms(words).astype(np.float64)  # in [6e-8, 1 - 6e-8]
    return int(np.argmax(weights - np.log(-np.log(u))))


def sampler(prf_key: Words, config: VllmGumbelConfig, unmarked: Words) -> Sampler:
    """See `schemes.Sampler`; `ids` are the generated tokens alone (possibly none).

    A row whose context was followed by a token before is drawn without the mark. With two keys a coin of the unmarked
    key, thrown by the whole history, says which one marks.
    """
    from assay.kernels import race

    width = config.context_width
    keys = subkeys(prf_key, config)

    def draw(ids: npt.NDArray[np.int64], log_weights: LogWeights, pad_token_id: int | None) -> npt.NDArray[np.int64]:
        pad = -1 if pad_token_id is None else pad_token_id
        log_weights = race._checked(log_weights, len(ids))
        out = np.empty(len(ids), dtype=np.int64)
        plain = []
        for row in range(len(ids)):
            history = real_history(ids[row], pad)
            long = np.concatenate([np.full(width, -1, dtype=np.int64), history]).astype(np.uint32)
            windows = np.lib.stride_tricks.sliding_window_view(long, width)
            if (windows[:-1] == windows[-1]).all(axis=1).any():
                plain.append(row)
                continue
            key = keys[0]
            if len(keys) == 2:
                # A marked row needs no noise: the subkey of its noise is free to be the coin.
                coin = int(plain_subkeys(ids[row : row + 1], pad, unmarked)[0, 0])
                key = keys[coin < config.alpha * 2.0**32]
            weights = log_weights[row]
            if np.isnan(weights).any() or not np.isfinite(weights.max()):
                plain.append(row)  # the race refuses it with a message
                continue
            out[row] = next_token(windows[-1], weights, key)
        if plain:
            out[plain] = race.winners(plain_subkeys(ids[plain], pad, unmarked), log_weights[plain])
        return out

    return draw
