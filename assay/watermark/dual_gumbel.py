"""Dual-key Gumbel watermark for speculative decoding: drafts race under key A, what the target model adds under key B.

Over keys the emitted tokens have exactly the target model's law, whatever the draft model. Under H0 both words of each
distinct (context, token) are independent and uniform; under H1 one of the two leans. Reference: Leviathan, Kalman and
Matias (2023), arXiv:2211.17192, Theorem 3.5 (speculative sampling); Hu and Huang (2024), arXiv:2410.20418 (why one key
cannot serve both). A and B are HChaCha20 of the scheme's key and a role; the key itself keys no context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import PAD, Words, hchacha20
from assay.kernels.dedup import first_occurrences
from assay.watermark import gumbel
from assay.watermark.keys import KeepsKeys
from assay.watermark.schemes import Sampler, SchemeConfig, register

LogProbabilities = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Role = Literal["draft", "target", "coin"]

_ROLES: dict[Role, int] = {"draft": 1, "target": 2, "coin": 3}


@register
@dataclass(frozen=True, kw_only=True)
class DualGumbelConfig(SchemeConfig):
    """Settings of the dual-key Gumbel watermark.

    Attributes
    ----------
    window
        Context width h, in [1, 64]; see `GumbelConfig`.
    """

    scheme: ClassVar[str] = "dual-gumbel"
    version: ClassVar[int] = 1

    window: int = 4

    def __post_init__(self) -> None:
        gumbel.GumbelConfig(window=self.window)  # the same range, the same message


@dataclass(frozen=True)
class DualPivots:
    """What a document shows under the two keys.

    Attributes
    ----------
    positions
        int64, shape (k,), ascending: each distinct (context, token) once, at its first place.
    draft_words, target_words
        uint32, shape (k,): the token's PRF words under keys A and B. Independent and uniform under the null.
    n_tokens, n_repeats_dropped
        As `gumbel.Pivots`.
    """

    positions: npt.NDArray[np.int64]
    draft_words: Words
    target_words: Words
    n_tokens: int
    n_repeats_dropped: int


def role_key(key: Words, role: Role) -> Words:
    """The PRF key of one role under a scheme's key, or under the key of its unmarked draws.

    Parameters
    ----------
    key
        uint32, shape (8,): from `keys.use_key` or `gumbel.unmarked_key`.
    role
        "draft" (key A), "target" (key B) or "coin".
    """
    group = np.array([[PAD, PAD, PAD, _ROLES[role]]], dtype=np.uint32)
    derived: Words = hchacha20(key, group)[0]
    return derived


@dataclass(frozen=True)
class RoundKeys(KeepsKeys):
    """All keys of one generation with drafts, derived once by `round_keys`. Secret; its repr shows nothing.

    Attributes
    ----------
    draft, target
        uint32, shape (8,): keys A and B.
    unmarked_draft, unmarked_target, coin
        uint32, shape (8,): of the draws that carry no mark. A rejected draft and its replacement stand after the same
        history, so they too must not share noise.
    """

    draft: Words = field(repr=False)
    target: Words = field(repr=False)
    unmarked_draft: Words = field(repr=False)
    unmarked_target: Words = field(repr=False)
    coin: Words = field(repr=False)


def round_keys(prf_key: Words, unmarked: Words) -> RoundKeys:
    """The keys that `draft_tokens` and `verify` need, from `keys.use_key` and `gumbel.unmarked_key`."""
    return RoundKeys(
        role_key(prf_key, "draft"),
        role_key(prf_key, "target"),
        role_key(unmarked, "draft"),
        role_key(unmarked, "target"),
        role_key(unmarked, "coin"),
    )


def sampler(prf_key: Words, config: DualGumbelConfig, unmarked: Words) -> Sampler:
    """See `schemes.sampler_of`: generation without a draft model, where every token races under key A.

    This is the case of a draft model that equals the target: each of its drafts is accepted.
    """
    single = gumbel.GumbelConfig(window=config.window)
    return gumbel.sampler(role_key(prf_key, "draft"), single, role_key(unmarked, "draft"))


def draft_tokens(
    ids: npt.NDArray[np.int64],
    log_weights: LogProbabilities,
    keys: RoundKeys,
    config: DualGumbelConfig,
    *,
    pad_token_id: int | None = None,
) -> npt.NDArray[np.int64]:
    """The draft model's next token of each row: its law raced under key A.

    Parameters
    ----------
    ids
        int64, shape (rows, t): the history of each row, earlier drafts included; padded on the left with
        `pad_token_id`, or with -1 where that is None.
    log_weights
        float32 or float64, shape (rows, V): the draft model's log-probabilities, after temperature and truncation.
    keys
        From `round_keys`.
    config
        The key's settings.

    Returns
    -------
    int64, shape (rows,).
    """
    return gumbel.next_tokens_padded(
        ids,
        log_weights,
        pad_token_id=pad_token_id,
        prf_key=keys.draft,
        window=config.window,
        unmarked=keys.unmarked_draft,
    )


def verify(
    history: npt.NDArray[np.int64],
    drafted: npt.NDArray[np.int64],
    log_draft: LogProbabilities,
    log_target: LogProbabilities,
    keys: RoundKeys,
    config: DualGumbelConfig,
) -> npt.NDArray[np.int64]:
    """What one round of speculative decoding emits: accepted drafts, then one token of the target model.

    Guarantee: over keys, each emitted token has the target model's law given what stands before it, whatever the draft
    model. A pure function of its arguments: drafts that a round rejects leave no trace.

    Parameters
    ----------
    history
        int64, shape (t,): all tokens so far, without padding.
    drafted
        int64, shape (k,), k >= 0: from `draft_tokens`, each given the history and the drafts before it.
    log_draft
        float32 or float64, shape (k, V): the draft model's log-probabilities at each drafted token, as they were given
        to `draft_tokens`.
    log_target
        Shape (k + 1, V): the target model's, given the history and the first 0..k drafts.
    keys, config
        As `draft_tokens`.

    Returns
    -------
    int64, shape (m,), 1 <= m <= k + 1.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a law is not finite or -inf with a finite largest value.

    Notes
    -----
    Draft x ~ q stands with probability min(1, p(x) / q(x)); else the token is drawn from max(p - q, 0), normalised.
    """
    k = len(drafted)
    if log_target.ndim != 2 or len(log_target) != k + 1:
        raise ValueError(f"log_target must have shape (k + 1, V) with k = {k} drafts, got {log_target.shape}.")
    if log_draft.shape != (k, log_target.shape[1]):
        raise ValueError(f"log_draft must have shape ({k}, {log_target.shape[1]}), got {log_draft.shape}.")
    if k and not 0 <= drafted.min() <= drafted.max() < log_target.shape[1]:
        raise ValueError(f"drafted must be ids below {log_target.shape[1]}, got {drafted.min()} to {drafted.max()}.")
    sofar = np.asarray(history, dtype=np.int64)
    law: LogProbabilities = log_target[k]
    for i, token in enumerate(drafted.tolist()):
        target, draft = _probabilities(log_target[i]), _probabilities(log_draft[i])
        if _coin(sofar, keys) * draft[token] >= target[token]:
            # The rejected draft used key A in this context; its replacement needs noise that the draft has not seen.
            with np.errstate(divide="ignore"):
                residual = np.log(np.maximum(target - draft, 0.0))
            law = residual if np.any(target > draft) else log_target[i]
            break
        sofar = np.append(sofar, token)
    last = gumbel.next_tokens_padded(
        sofar[None],
        law[None],
        pad_token_id=None,
        prf_key=keys.target,
        window=config.window,
        unmarked=keys.unmarked_target,
    )
    return np.append(sofar, last)[len(history) :]


def observe(
    ids: Words, prf_key: Words, config: DualGumbelConfig, *, prompt_length: int = 0, backend: prf.Backend = "auto"
) -> DualPivots:
    """The PRF words of a text's tokens under both keys, repeats dropped; the prompt gives context only.

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
    positions, draft, target = scan(ids, offsets, prf_key, config, backend=backend)
    counted, n_text, n_dropped = gumbel.after_prompt(positions, len(ids), prompt_length, config.window)
    return DualPivots(positions[counted] - prompt_length, draft[counted], target[counted], n_text, n_dropped)


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: DualGumbelConfig,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], Words, Words]:
    """Counted positions and their words under keys A and B, for many documents that lie end to end."""
    positions = np.flatnonzero(first_occurrences(ids, offsets, config.window + 1))
    draft, target = (
        prf.words_of(role_key(prf_key, role), ids, positions, config.window, backend=backend)
        for role in ("draft", "target")
    )
    return positions, draft, target


def _coin(sofar: npt.NDArray[np.int64], keys: RoundKeys) -> float:
    """A uniform number in (0, 1), keyed by the whole history: it decides whether a draft stands."""
    context = gumbel._whole_history(sofar, -1)[None]
    word = prf.words_at(keys.coin, context, np.zeros(1, dtype=np.uint32), backend="numba")
    return (float(word[0]) + 0.5) * 2.0**-32


def _probabilities(log_weights: LogProbabilities) -> npt.NDArray[np.float64]:
    weights = np.asarray(log_weights, dtype=np.float64)
    peak = weights.max()
    if not np.isfinite(peak) or np.isnan(weights).any():
        raise ValueError("log_draft and log_target must be finite or -inf, with a finite largest value in each row.")
    law: npt.NDArray[np.float64] = np.exp(weights - peak)
    law /= law.sum()
    return law
