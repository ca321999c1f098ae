"""Multi-bit Gumbel watermark: up to 32 bits (a user or deployment id) in a tail-biting trellis code.

Each marked context races under one of 2^K keys; which one is the code's register at the step that the context is
assigned to. Law of the text: exactly the model's, over keys, for every payload. Under H0 the 2^K words of each distinct
(context, token) are independent and uniform; so are, in marked text, those of every register but the payload's own.
Reference: Viterbi and Omura (1979), section 5.2 (orthogonal convolutional codes); Ma and Wolf (1986) (tail biting).
All keys are HChaCha20 of the scheme's key and a role: symbols 0 .. 255, then 256 for the steps; that key itself keys no
context. Independent keys, not rotations of one: an edit that rotates token ids must not turn one payload into another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import PAD, Words, hchacha20
from assay.kernels.dedup import first_occurrences
from assay.watermark import gumbel
from assay.watermark.schemes import Sampler, SchemeConfig, register

_MEMORY = 8  # bits of the payload that a register shows; 2^8 orthogonal symbols
_STEP_ROLE = 256


@register
@dataclass(frozen=True, kw_only=True)
class PayloadConfig(SchemeConfig):
    """Settings of the multi-bit watermark.

    Attributes
    ----------
    bits
        Length of the payload, in [1, 32]. Shorter payloads need fewer tokens.
    window
        Context width h, in [1, 64]; see `GumbelConfig`.
    """

    scheme: ClassVar[str] = "payload-gumbel"
    version: ClassVar[int] = 1

    bits: int = 32
    window: int = 4

    def __post_init__(self) -> None:
        gumbel.GumbelConfig(window=self.window)  # the same range, the same message
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 32:
            raise ValueError(f"bits must be an integer in [1, 32], got {self.bits!r}.")

    @property
    def memory(self) -> int:
        """K: how many bits of the payload one register shows."""
        return min(_MEMORY, self.bits)


@dataclass(frozen=True)
class PayloadPivots:
    """What a document shows under one key.

    Attributes
    ----------
    positions
        int64, shape (k,), ascending: each distinct (context, token) once, at its first place.
    steps
        int64, shape (k,), in [0, bits): the step of the code that the token's context is assigned to.
    words
        uint32, shape (k, 2^K): the token's PRF word under each symbol. Independent and uniform under the null.
    n_tokens, n_repeats_dropped
        As `gumbel.Pivots`.
    """

    positions: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    words: Words
    n_tokens: int
    n_repeats_dropped: int


def registers(payload: int, config: PayloadConfig) -> npt.NDArray[np.int64]:
    """The code word of a payload: the register at each step.

    Register j holds bits j, j - 1, ..., j - K + 1 of the payload, indices modulo its length, bit j lowest. Payloads
    that differ in one bit differ in K registers, and differ at all of them where the payload has at most K bits.

    Parameters
    ----------
    payload
        In [0, 2^bits).

    Returns
    -------
    int64, shape (bits,), in [0, 2^K).

    Raises
    ------
    ValueError
        If the payload is not an integer in that range.
    """
    if isinstance(payload, bool) or not isinstance(payload, (int, np.integer)) or not 0 <= payload < 1 << config.bits:
        raise ValueError(f"payload must be an integer in [0, 2**{config.bits}), got {payload!r}. Use more bits=.")
    bits = np.array([int(payload) >> i & 1 for i in range(config.bits)], dtype=np.int64)
    out = np.zeros(config.bits, dtype=np.int64)
    for d in range(config.memory):
        out |= np.roll(bits, d) << d
    return out


def sampler(prf_key: Words, config: PayloadConfig, unmarked: Words, payload: int = 0) -> Sampler:
    """See `schemes.sampler_of`; `payload`, in [0, 2^bits), is what the text will carry.

    Guarantee: over keys the text has the model's law, for every payload. A token is marked where
    `gumbel.marked_context` gives a context.

    Raises
    ------
    ValueError
        If the payload is out of range.
    """
    code = registers(payload, config)
    keys = symbol_keys(prf_key, config)
    step_key = _role_keys(prf_key, np.array([_STEP_ROLE]))[0]

    def race_keys(ids: npt.NDArray[np.int64], pad_token_id: int | None) -> Words:
        from assay.kernels import race

        pad = -1 if pad_token_id is None else pad_token_id
        noise = np.empty((len(ids), 8), dtype=np.uint32)
        for row, history in enumerate(ids):
            context = gumbel.marked_context(gumbel.real_history(history, pad), config.window)
            if context is None:
                noise[row] = race.subkeys(unmarked, gumbel._whole_history(history, pad)[None])[0]
            else:
                symbol = code[_steps(step_key, context[None], config)[0]]
                noise[row] = race.subkeys(keys[symbol], context[None])[0]
        return noise

    return gumbel.RaceSampler(race_keys)


def symbol_keys(prf_key: Words, config: PayloadConfig) -> Words:
    """The race keys of all symbols: uint32, shape (2^K, 8). Secret."""
    return _role_keys(prf_key, np.arange(1 << config.memory))


def observe(
    ids: Words, prf_key: Words, config: PayloadConfig, *, prompt_length: int = 0, backend: prf.Backend = "auto"
) -> PayloadPivots:
    """The steps and words of a text's tokens, repeats dropped; the prompt gives context only.

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

    Notes
    -----
    2^(K + 1) ChaCha permutations and 2^(K + 2) bytes per token.
    """
    offsets = np.array([0, len(ids)], dtype=np.int64)
    positions = np.flatnonzero(first_occurrences(ids, offsets, config.window + 1))
    counted, n_text, n_dropped = gumbel.after_prompt(positions, len(ids), prompt_length, config.window)
    steps, words = words_of(ids, positions[counted], prf_key, config, backend=backend)
    return PayloadPivots(positions[counted] - prompt_length, steps, words, n_text, n_dropped)


def words_of(
    ids: Words,
    positions: npt.NDArray[np.int64],
    prf_key: Words,
    config: PayloadConfig,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], Words]:
    """Steps, int64, shape (k,), and words, uint32, shape (k, 2^K), of the tokens at `positions`, each >= window."""
    keys = symbol_keys(prf_key, config)
    step_key = _role_keys(prf_key, np.array([_STEP_ROLE]))[0]
    if backend == "auto":
        backend = "numba"  # one call for each symbol: in numpy 256 of them cost more than loading numba
    contexts = (
        np.lib.stride_tricks.sliding_window_view(ids, config.window) if len(ids) >= config.window else ids[:, None]
    )
    steps = _steps(step_key, contexts[positions - config.window], config, backend)
    words = np.empty((len(keys), len(positions)), dtype=np.uint32)
    for symbol, key in enumerate(keys):
        words[symbol] = prf.words_of(key, ids, positions, config.window, backend=backend)
    return steps, np.ascontiguousarray(words.T)


def _role_keys(prf_key: Words, roles: npt.NDArray[np.int64]) -> Words:
    groups = np.full((len(roles), 4), PAD, dtype=np.uint32)
    groups[:, 3] = roles
    derived: Words = hchacha20(prf_key, groups)
    return derived


def _steps(
    step_key: Words, contexts: Words, config: PayloadConfig, backend: prf.Backend = "numba"
) -> npt.NDArray[np.int64]:
    """The step of each context: floor(word * bits / 2^32), uniform up to 2^-27."""
    words = prf.words_at(step_key, contexts, np.zeros(len(contexts), dtype=np.uint32), backend=backend)
    return (words.astype(np.int64) * config.bits) >> 32
