"""Green list keyed by the context: each candidate is green with chance gamma, and green ones get a bonus delta.

Under H0 the colours of distinct coins are independent, green with chance exactly floor(gamma 2**32) / 2**32; under H1
green is likelier. Reference: Kirchenbauer et al. (2023), arXiv:2301.10226 (lists); (2024), arXiv:2306.04634 (min-hash).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark._coins import (
    ANCHOR,
    MEMBER,
    Coins,
    after_prompt,
    check_real,
    check_window,
    context_words,
    plain_subkeys,
    threshold_of,
)
from assay.watermark.schemes import Sampler, SchemeConfig, register

# A bonus above this would be the hard list for every law that a PRF of 32 bits can resolve.
MAX_DELTA = 20.0


@register
@dataclass(frozen=True, kw_only=True)
class GreenListConfig(SchemeConfig):
    """Settings of the green list.

    Attributes
    ----------
    window
        How many preceding tokens the list depends on, in [1, 64].
    gamma
        Chance that a candidate is green, in (0, 1); rounded down to a multiple of 2**-32.
    delta
        Bonus on the log-probability of green candidates, in (0, 20]. None is the hard list: only green candidates are
        drawn, where one has positive probability.
    seeding
        "left": a candidate's colour is keyed by all `window` preceding tokens and the candidate; one changed token
        spoils window + 1 coins. "self": the candidate picks one of the preceding tokens by the smallest of their keyed
        words, and its colour is keyed by that token and itself; a changed token spoils about two coins, and fewer coins
        are distinct.
    """

    scheme: ClassVar[str] = "green-list"
    version: ClassVar[int] = 1
    distortion_free: ClassVar[bool] = False

    window: int = 4
    gamma: float = 0.25
    delta: float | None = 2.0
    seeding: Literal["left", "self"] = "left"

    def __post_init__(self) -> None:
        check_window(self.window)
        # Stored as floats: 2 and 2.0 must not derive two keys.
        object.__setattr__(self, "gamma", check_share(self.gamma))
        object.__setattr__(self, "delta", check_delta(self.delta))
        if self.seeding not in ("left", "self"):
            raise ValueError(f"seeding must be 'left' or 'self', got {self.seeding!r}.")

    @property
    def chance(self) -> float:
        """The exact chance that a coin is green under the null: floor(gamma 2**32) / 2**32."""
        return threshold_of(self.gamma) / 2.0**32


def check_share(gamma: object) -> float:
    """A share of green candidates, checked."""
    share = check_real("gamma", gamma, "(0, 1)", low=0.0, high=1.0)
    if not 1 <= threshold_of(share) < 2**32:
        raise ValueError(f"gamma must be a number in (0, 1), at least 2**-32, got {gamma!r}.")
    return share


def check_delta(delta: object) -> float | None:
    """A bonus, checked; None is the hard list."""
    if delta is None:
        return None
    return check_real("delta", delta, f"(0, {MAX_DELTA:g}] or None for the hard list", low=0.0, high=MAX_DELTA)


def anchors_of(contexts: Words, tokens: Words, prf_key: Words, *, backend: prf.Backend = "auto") -> Words:
    """Seeding "self": which of the preceding tokens keys the colour of each token.

    Parameters
    ----------
    contexts
        uint32, shape (k, h), oldest token first.
    tokens
        uint32, shape (k,).
    prf_key
        uint32, shape (8,): from `keys.use_key`.

    Returns
    -------
    uint32, shape (k,): the preceding token whose anchor word with the token is smallest; equal words go to the lower
    id.
    """
    least = np.full(len(tokens), 2**64 - 1, dtype=np.uint64)
    for j in range(contexts.shape[1]):
        words = prf.words_at(prf_key, contexts[:, j : j + 1], tokens, stream=ANCHOR, backend=backend)
        least = np.minimum(least, (words.astype(np.uint64) << np.uint64(32)) | contexts[:, j])
    return (least & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: GreenListConfig,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Counted positions and colours of many documents that lie end to end.

    Parameters
    ----------
    ids
        uint32, shape (n,).
    offsets
        int64, shape (documents + 1,).
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    config
        The key's settings.

    Returns
    -------
    positions
        int64, shape (k,), ascending, into `ids`: the first place of each distinct coin of a document. A coin is a
        (context, token) pair, or with seeding "self" an (anchor, token) pair, which many contexts share.
    green
        bool, shape (k, 1).
    """
    threshold = np.uint64(threshold_of(config.gamma))
    if config.seeding == "left":
        positions, words = context_words(ids, offsets, prf_key, config.window, MEMBER, backend=backend)
        return positions, (words < threshold)[:, None]
    positions = np.flatnonzero(first_occurrences(ids, offsets, config.window + 1))
    tokens = ids[positions]
    if len(positions) == 0:
        return positions, np.empty((0, 1), dtype=np.bool_)
    contexts = np.lib.stride_tricks.sliding_window_view(ids, config.window)[positions - config.window]
    anchors = anchors_of(contexts, tokens, prf_key, backend=backend)
    document = np.searchsorted(offsets, positions, side="right")
    coins = np.stack([document, anchors.astype(np.int64), tokens.astype(np.int64)], axis=1)
    first = np.sort(np.unique(coins, axis=0, return_index=True)[1])
    words = prf.words_at(prf_key, anchors[first, None], tokens[first], stream=MEMBER, backend=backend)
    return positions[first], (words < threshold)[:, None]


def observe(ids: Words, prf_key: Words, config: GreenListConfig, *, prompt_length: int = 0) -> Coins:
    """The colours of a text's distinct coins.

    Guarantee: for a text chosen without knowledge of the key the outcomes are independent, true with chance
    `config.chance`. With seeding "self" this holds given the anchors, which other PRF words decide.

    Parameters
    ----------
    ids
        uint32, shape (n,): prompt and text.
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    config
        The key's settings.
    prompt_length
        How many of the ids are the prompt: context only, and what it showed does not count again.
    """
    offsets = np.array([0, len(ids)], dtype=np.int64)
    positions, green = scan(ids, offsets, prf_key, config)
    return after_prompt(positions, green, len(ids), prompt_length, config.window)


def list_subkeys(contexts: Words, prf_key: Words, config: GreenListConfig) -> tuple[Words, Words]:
    """The subkeys of each context's list, shape (n, k, 8), and the anchors they belong to, shape (n, k).

    k is 1 for seeding "left", `window` for "self".
    """
    from assay.kernels.race import subkeys

    if config.seeding == "left":
        return subkeys(prf_key, contexts)[:, None], np.zeros((len(contexts), 1), dtype=np.uint32)
    single = np.ascontiguousarray(contexts).reshape(-1, 1)
    return subkeys(prf_key, single).reshape(*contexts.shape, 8), contexts


def sampler(prf_key: Words, config: GreenListConfig, unmarked: Words) -> Sampler:
    """See `schemes.sampler_of`. Every token that `window` tokens precede is drawn from the tilted law.

    Repeated contexts are tilted too: the law of the text is not the model's anyway, and new tokens after a known
    context are new coins.
    """
    boost = math.inf if config.delta is None else math.exp(config.delta)

    def draw(
        ids: npt.NDArray[np.int64],
        log_weights: npt.NDArray[np.float32] | npt.NDArray[np.float64],
        pad_token_id: int | None,
    ) -> npt.NDArray[np.int64]:
        from assay.kernels import tilted_race

        pad = -1 if pad_token_id is None else pad_token_id
        contexts, kinds = tilted_race.contexts(ids, pad, config.window)
        keys, anchors = list_subkeys(contexts, prf_key, config)
        return tilted_race.green_winners(
            keys,
            anchors,
            kinds != tilted_race.SHORT,
            plain_subkeys(ids, pad, unmarked),
            log_weights,
            streams=(MEMBER, ANCHOR),
            threshold=threshold_of(config.gamma),
            boost=boost,
        )

    return draw
