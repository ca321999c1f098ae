"""Gumbel-max watermark: token = argmin E_v / p_v, E_v from the PRF of the last h tokens.

Under H0 each -log(1 - U) is Exp(1), independent after repeats are dropped; under H1 it is larger where p_v < 1.
Reference: Aaronson (2022); Huang et al. (2023), section 3 (exponential race), arXiv:2312.07930.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark.keys import KeepsKeys, SecretKey, use_key
from assay.watermark.schemes import Sampler, SchemeConfig, register

Scores = npt.NDArray[np.float64]

_MAX_ID = 0xFFFFFFFE  # 0xFFFFFFFF pads short contexts


@register
@dataclass(frozen=True, kw_only=True)
class GumbelConfig(SchemeConfig):
    """Settings of the Gumbel watermark.

    Attributes
    ----------
    window
        Context width h, in [1, 64]: how many preceding tokens key the noise. A wider window repeats less often and
        survives fewer edits: one changed token spoils h + 1 pivots.
    """

    scheme: ClassVar[str] = "gumbel"
    version: ClassVar[int] = 1

    window: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or not 1 <= self.window <= 64:
            raise ValueError(f"window must be an integer in [1, 64], got {self.window!r}.")


@dataclass(frozen=True)
class Pivots:
    """What a document shows under one key.

    Attributes
    ----------
    positions
        int64, shape (k,), ascending: the tokens that count; each distinct (context, token) once, at its first place.
    words
        uint32, shape (k,): the PRF word of each counted token. Uniform on 0 .. 2**32 - 1 under the null.
    n_tokens
        Tokens in the document.
    n_repeats_dropped
        Tokens with a full context that were left out as repeats.
    """

    positions: npt.NDArray[np.int64]
    words: Words
    n_tokens: int
    n_repeats_dropped: int


def config_of(key: SecretKey) -> GumbelConfig:
    """The key's settings, checked to be those of this scheme."""
    if not isinstance(key.config, GumbelConfig):
        raise ValueError(
            f"key must be for scheme 'gumbel', got {key.config.tag!r} (key {key.id!r}). "
            "Make one with SecretKey.generate(config=GumbelConfig())."
        )
    return key.config


def token_ids(tokens: npt.ArrayLike) -> Words:
    """Token ids as uint32, checked.

    Raises
    ------
    ValueError
        If `tokens` is not one-dimensional, not of integers, or an id is outside [0, 4294967294].
    """
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise ValueError("tokens must be one-dimensional, got rows of different lengths.") from None
    if array.ndim != 1:
        raise ValueError(f"tokens must be one-dimensional, got shape {array.shape}. Test one document at a time.")
    if array.size == 0:
        return np.empty(0, dtype=np.uint32)
    if array.dtype == np.uint32:
        checked: Words = array
        if int(checked.max()) > _MAX_ID:
            raise ValueError(f"tokens must be ids in [0, {_MAX_ID}], got {int(checked.max())}.")
        return checked
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"tokens must be integers, got {array.dtype}. Pass token ids, or a text with its tokenizer.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > _MAX_ID:
        raise ValueError(f"tokens must be ids in [0, {_MAX_ID}], got {low if low < 0 else high}.")
    return array.astype(np.uint32)


def pivots(tokens: npt.ArrayLike, key: SecretKey, *, backend: prf.Backend = "auto") -> Pivots:
    """The PRF words of a document's tokens, repeats dropped.

    Guarantee: for a text chosen without knowledge of the key, the words are independent and uniform.

    Parameters
    ----------
    tokens
        Integers, shape (n,): token ids.
    key
        A key of scheme "gumbel".
    backend
        PRF backend; all give the same words.

    Raises
    ------
    ValueError
        On ids out of range or a key of another scheme.
    """
    return observe(token_ids(tokens), use_key(key), config_of(key), backend=backend)


def observe(
    ids: Words, prf_key: Words, config: GumbelConfig, *, prompt_length: int = 0, backend: prf.Backend = "auto"
) -> Pivots:
    """As `pivots`, for a text that follows a prompt.

    The prompt gives context and is not itself tested; what it already showed is not counted again.

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
    positions, words = scan(ids, offsets, prf_key, config.window, backend=backend)
    counted, n_text, n_dropped = after_prompt(positions, len(ids), prompt_length, config.window)
    return Pivots(positions[counted] - prompt_length, words[counted], n_text, n_dropped)


def after_prompt(
    positions: npt.NDArray[np.int64], length: int, prompt_length: int, window: int
) -> tuple[npt.NDArray[np.bool_], int, int]:
    """Of places in prompt and text: which stand in the text, its number of tokens, and how many were left out of it.

    Parameters
    ----------
    positions
        int64, shape (k,): the first place of each PRF input; what the prompt showed does not count again.
    length
        Number of ids of prompt and text.
    prompt_length
        Number of ids of the prompt, in [0, length].
    window
        How many ids stand before the first that has a PRF input.

    Returns
    -------
    counted
        bool, shape (k,).
    n_text, n_dropped
        Tokens of the text, and those of them that repeat an earlier input.
    """
    counted = positions >= prompt_length
    full = min(length - prompt_length, max(0, length - window))
    return counted, length - prompt_length, full - int(np.sum(counted))


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    window: int,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], Words]:
    """Counted positions and PRF words of many documents that lie end to end.

    Parameters
    ----------
    ids
        uint32, shape (n,).
    offsets
        int64, shape (documents + 1,).
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    window
        Context width h.

    Returns
    -------
    positions
        int64, shape (k,), ascending, into `ids`.
    words
        uint32, shape (k,).
    """
    positions = np.flatnonzero(first_occurrences(ids, offsets, window + 1))
    return positions, prf.words_of(prf_key, ids, positions, window, backend=backend)


def sum_scores(words: Words) -> Scores:
    """The model-free score -log(1 - U) at the conservative edge of each word's cell.

    P(word <= x) = (x + 1) / 2**32, so the score -log((x + 1) / 2**32) is stochastically at most Exp(1) and its sum's
    Gamma tail is an upper bound, exactly and not only up to 2**-32.

    Returns
    -------
    float64, same shape, range [0, 22.2]. Large scores speak for the mark.
    """
    scores: Scores = 32 * np.log(2.0) - np.log(words.astype(np.float64) + 1.0)
    return scores


def race_scores(words: Words) -> Scores:
    """The race time -log(U) at the conservative edge of each word's cell: stochastically at least Exp(1).

    Returns
    -------
    float64, same shape, range [2.3e-10, inf]; inf only for the word 2**32 - 1. Small scores speak for the mark.
    """
    with np.errstate(divide="ignore"):
        times: Scores = -np.log1p(-(words.astype(np.float64) + 1.0) * 2.0**-32)
    return times


def marked_context(history: npt.ArrayLike, window: int) -> Words | None:
    """The context that keys the next token, or None where the next token must be drawn without the mark.

    A token is marked only if `window` tokens precede it and the same context has not been followed by a token in this
    history before; both rules keep the law of the whole text exactly that of the model.

    Parameters
    ----------
    history
        Integers, shape (n,): all tokens so far, prompt included, padding excluded.
    """
    ids = np.asarray(history, dtype=np.uint32)
    if len(ids) < window:
        return None
    context = ids[-window:]
    followed = np.lib.stride_tricks.sliding_window_view(ids[:-1], window) if len(ids) > window else ids[:0, None]
    return None if (followed == context).all(axis=1).any() else context


def unmarked_key(seed: bytes) -> Words:
    """The PRF key of the unmarked draws of one generation: independent of every watermark key.

    Parameters
    ----------
    seed
        Any bytes; fresh randomness for each generation, or a fixed seed where the text must be reproducible.
    """
    return _words(hashlib.blake2b(seed, person=b"assay-unmarked", digest_size=32))


def next_tokens(
    histories: Sequence[npt.NDArray[np.integer]],
    log_weights: npt.NDArray[np.float32] | npt.NDArray[np.float64],
    *,
    prf_key: Words,
    window: int,
    unmarked: Words,
) -> npt.NDArray[np.int64]:
    """The next token of each row: a pure function of (history, log-probabilities, keys).

    Guarantee: over uniform keys each row's token has the law softmax(log_weights) given its history, within the
    resolution of the PRF words (see `kernels.race.winners`).

    Parameters
    ----------
    histories
        One integer array per row, shape (n_i,): all tokens so far, prompt included, padding excluded.
    log_weights
        float32 or float64, shape (rows, V): unnormalised log-probabilities after temperature and truncation; -inf for
        a token that must not be drawn.
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    window
        Context width h.
    unmarked
        uint32, shape (8,): from `unmarked_key`. Rows that must not be marked race with its noise, keyed by their
        whole history, so that the draw does not depend on how the history came about (assisted decoding, batching).

    Returns
    -------
    int64, shape (rows,).

    Raises
    ------
    ValueError
        If there is not one history per row, or a row contains NaN or +inf, or nothing but -inf.
    """
    width = max(map(len, histories), default=0)
    ids = np.full((len(histories), width), -1, dtype=np.int64)
    for row, history in zip(ids, histories, strict=True):
        row[width - len(history) :] = history
    return next_tokens_padded(ids, log_weights, pad_token_id=None, prf_key=prf_key, window=window, unmarked=unmarked)


def next_tokens_padded(
    ids: npt.NDArray[np.int64],
    log_weights: npt.NDArray[np.float32] | npt.NDArray[np.float64],
    *,
    pad_token_id: int | None,
    prf_key: Words,
    window: int,
    unmarked: Words,
) -> npt.NDArray[np.int64]:
    """As `next_tokens`, with the histories as engines hold them: rows of one array, padded on the left.

    Parameters
    ----------
    ids
        int64, shape (rows, t): token ids. A leading run of `pad_token_id` is no part of a row's history.
    log_weights, prf_key, window, unmarked
        As `next_tokens`.
    pad_token_id
        None where -1 pads, or nothing.
    """
    from assay.kernels import race

    return race.winners(race_keys(ids, pad_token_id, prf_key=prf_key, window=window, unmarked=unmarked), log_weights)


def race_keys(
    ids: npt.NDArray[np.int64], pad_token_id: int | None, *, prf_key: Words, window: int, unmarked: Words
) -> Words:
    """The subkey of each row's race, from its context or, where it must not be marked, from its whole history.

    Parameters
    ----------
    ids, pad_token_id, prf_key, window, unmarked
        As `next_tokens_padded`.

    Returns
    -------
    uint32, shape (rows, 8).
    """
    from assay.kernels import race

    pad = -1 if pad_token_id is None else pad_token_id
    keys, plain = race.marked_keys(ids, pad, window, prf_key)
    if len(plain):
        keys[plain] = race.subkeys(unmarked, np.stack([_whole_history(ids[row], pad) for row in plain]))
    return keys


@dataclass(frozen=True, eq=False)
class RaceSampler(KeepsKeys):
    """A `schemes.Sampler` whose tokens are the winners of one keyed race per row.

    What keys a race depends on the history alone, so that the race may be run wherever the log-weights are.

    Attributes
    ----------
    race_keys
        `(ids, pad_token_id) -> keys`: uint32, shape (rows, 8), the subkey of each row's race. Holds secrets.
    """

    race_keys: Callable[[npt.NDArray[np.int64], int | None], Words] = field(repr=False)

    def __deepcopy__(self, memo: dict[int, object]) -> RaceSampler:
        return self  # immutable, as the functions that other schemes have for samplers

    def __call__(
        self,
        ids: npt.NDArray[np.int64],
        log_weights: npt.NDArray[np.float32] | npt.NDArray[np.float64],
        pad_token_id: int | None,
    ) -> npt.NDArray[np.int64]:
        """The next token of each row; see `schemes.Sampler`."""
        from assay.kernels import race

        return race.winners(self.race_keys(ids, pad_token_id), log_weights)


def sampler(prf_key: Words, config: GumbelConfig, unmarked: Words) -> Sampler:
    """See `schemes.sampler_of`."""
    return RaceSampler(partial(race_keys, prf_key=prf_key, window=config.window, unmarked=unmarked))


def _whole_history(row: npt.NDArray[np.int64], pad: int) -> Words:
    """128 bits of a whole history as four words: equal histories, equal draws."""
    return _words(hashlib.blake2b(real_history(row, pad).astype("<u4").tobytes(), digest_size=16))


def real_history(row: npt.NDArray[np.int64], pad: int) -> npt.NDArray[np.int64]:
    """A row without its leading padding."""
    real = np.flatnonzero(row != pad)
    return row[real[0] :] if len(real) else row[:0]


def _words(digest: hashlib.blake2b) -> Words:
    return np.frombuffer(digest.digest(), dtype="<u4").astype(np.uint32)
