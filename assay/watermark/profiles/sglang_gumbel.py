"""sglang-gumbel: SGLang's native Gumbel watermark on a 32-bit Murmur mix, with one key or two; no torch needed.

Under H0 the word of each token in a new context is uniform, independently: -log(1 - u) is Exp(1). The real coin is the
32-bit hash of the context: the last h tokens of prompt and completion. SGLang marks, and detectors read, 4,096 of them.
Reference: Aaronson (2022); Appleby (2011), MurmurHash3; SGLang `sglang/srt/sampling/watermarking`, 0.5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.watermark._coins import LogWeights, plain_subkeys
from assay.watermark.foreign import ForeignConfig
from assay.watermark.gumbel import real_history
from assay.watermark.schemes import Sampler, register

MAX_CONTEXTS = 4096


@register
@dataclass(frozen=True, kw_only=True)
class SglangGumbelConfig(ForeignConfig):
    """Settings of SGLang's watermark file; the key is its `key`, or `key` and `key_b`, read as hexadecimal.

    Attributes
    ----------
    keys
        "single" or "dual": with two, a keyed coin says for each context which one marks.
    context_window
        In [1, 64]: preceding tokens, of prompt and completion, that key the noise.
    mixing_probability
        In (0, 1): how often key A marks, for two keys.
    """

    scheme: ClassVar[str] = "sglang-gumbel"
    version: ClassVar[int] = 1
    base: ClassVar[int] = 16

    keys: Literal["single", "dual"] = "single"
    context_window: int = 4
    mixing_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.keys not in ("single", "dual"):
            raise ValueError(f"keys must be 'single' or 'dual', got {self.keys!r}.")
        width, mixing = self.context_window, self.mixing_probability
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 64:
            raise ValueError(f"context_window must be an integer in [1, 64], got {width!r}.")
        if isinstance(mixing, bool) or not isinstance(mixing, (int, float)) or not 0.0 < mixing < 1.0:
            raise ValueError(f"mixing_probability must be a number in (0, 1), got {mixing!r}.")

    @property
    def n_integers(self) -> int:
        """One key, or two."""
        return 1 if self.keys == "single" else 2


def context_hashes(ids: Words, offsets: npt.NDArray[np.int64], window: int) -> Words:
    """Hash of the up to `window` ids before each place of its document."""
    from assay.watermark.profiles import hashes_numba

    out = np.empty(len(ids), dtype=np.uint32)
    hashes_numba.murmur_grams(ids, offsets, window, out)
    return out


def raw_words(contexts: Words, tokens: Words, prf_key: Words, config: SglangGumbelConfig) -> Words:
    """Murmur words of tokens after context hashes; with two keys each word is of the key that its context's coin names.

    Parameters
    ----------
    contexts, tokens
        uint32, shape (n,).
    prf_key
        uint32, shape (2,) or (4,): low and high word of each key.
    """
    from assay.watermark.profiles import hashes_numba

    out = np.empty(len(tokens), dtype=np.uint32)
    hashes_numba.murmur_words(prf_key[:2], contexts, tokens, out)
    if config.keys == "dual":
        coins, other = np.empty_like(out), np.empty_like(out)
        hashes_numba.murmur_coins(prf_key, contexts, coins)
        hashes_numba.murmur_words(prf_key[2:], contexts, tokens, other)
        out = np.where(coins < int(config.mixing_probability * 2**32), out, other)
    return out


def race_words(words: Words) -> Words:
    """The words in the orientation of `gumbel.sum_scores` and `race_scores`: small for marked tokens."""
    return ~words


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: SglangGumbelConfig,
    *,
    prompt_length: int = 0,
) -> tuple[npt.NDArray[np.int64], Words]:
    """First places of the first 4,096 distinct context hashes of documents end to end, and the words shown there.

    Without a prompt the first `context_window` tokens do not count, since part of their context is unknown; with one,
    the tokens after it all do.

    Parameters
    ----------
    ids
        uint32, shape (n,).
    offsets
        int64, shape (documents + 1,).
    prf_key
        uint32, shape (2,) or (4,): from `keys.use_key`.
    config
        The key's settings.
    prompt_length
        Places before it give context and do not count; for a single document.

    Returns
    -------
    positions
        int64, shape (k,), ascending, into `ids`.
    words
        uint32, shape (k,).
    """
    from assay.watermark.profiles import mersenne_numba

    hashes = context_hashes(ids, offsets, config.context_window)
    places = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
    eligible = places >= (prompt_length if prompt_length else config.context_window)
    new = np.zeros(len(ids), dtype=np.bool_)
    mersenne_numba.first_pairs(hashes, np.zeros_like(hashes), eligible, offsets, new)
    seen = np.concatenate([[0], np.cumsum(new)])
    new &= seen[1:] - np.repeat(seen[offsets[:-1]], np.diff(offsets)) <= MAX_CONTEXTS
    positions = np.flatnonzero(new)
    return positions, raw_words(hashes[positions], ids[positions], prf_key, config)


def official_score(
    ids: Words, prf_key: Words, config: SglangGumbelConfig, *, prompt_length: int = 0
) -> tuple[int, float]:
    """Contexts scored and "combined" score as SGLang's detector gives them; not a p-value.

    It tells contexts apart by their tokens, not by their hashes; the two differ in one text of some hundreds of
    thousands.
    """
    _, words = scan(ids, np.array([0, len(ids)], dtype=np.int64), prf_key, config, prompt_length=prompt_length)
    return len(words), float(np.sum(-np.log1p(-(words + 0.5) / 2.0**32)))


def next_token(context: np.uint32, weights: LogWeights, prf_key: Words, config: SglangGumbelConfig) -> int:
    """argmax log(u) / p over one row; ties go to the lowest id."""
    tokens = np.flatnonzero(weights > -np.inf).astype(np.uint32)
    words = raw_words(np.full(len(tokens), context, dtype=np.uint32), tokens, prf_key, config)
    times = -np.log((words + 0.5) / 2.0**32)
    # A race by logarithms: exp(-weight) of an unlikely token may overflow.
    return int(tokens[np.argmin(np.log(times) - weights[tokens].astype(np.float64))])


def sampler(prf_key: Words, config: SglangGumbelConfig, unmarked: Words) -> Sampler:
    """See `schemes.Sampler`. A row is drawn without the mark where its history is empty or showed the context before.

    SGLang stops after 4,096 marked contexts; this sampler, which is not told where the prompt ends, does not. Detectors
    leave the later ones out.
    """
    from assay.kernels import race

    def draw(ids: npt.NDArray[np.int64], log_weights: LogWeights, pad_token_id: int | None) -> npt.NDArray[np.int64]:
        pad = -1 if pad_token_id is None else pad_token_id
        log_weights = race._checked(log_weights, len(ids))
        out = np.empty(len(ids), dtype=np.int64)
        plain = []
        for row in range(len(ids)):
            history = real_history(ids[row], pad).astype(np.uint32)
            # One id more: its place has the context of the next token.
            longer = np.append(history, np.uint32(0))
            offsets = np.array([0, len(longer)], dtype=np.int64)
            hashes = context_hashes(longer, offsets, config.context_window)
            weights = log_weights[row]
            bad = np.isnan(weights).any() or not np.isfinite(weights.max())
            if len(history) == 0 or bad or (hashes[:-1] == hashes[-1]).any():
                plain.append(row)
            else:
                out[row] = next_token(hashes[-1], weights, prf_key, config)
        if plain:
            out[plain] = race.winners(plain_subkeys(ids[plain], pad, unmarked), log_weights[plain])
        return out

    return draw
