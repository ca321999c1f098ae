"""One green list per key for all contexts (Unigram): token v is green with chance gamma, green ones get a bonus delta.

Under H0 the colours of distinct token ids are independent, green with chance exactly floor(gamma 2**32) / 2**32.
Reference: Zhao, Ananth, Li, Wang (2023), arXiv:2306.17439.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark._coins import ANCHOR, MEMBER, Coins, after_prompt, plain_subkeys, threshold_of
from assay.watermark.green_list import check_delta, check_share
from assay.watermark.schemes import Sampler, SchemeConfig, register


@register
@dataclass(frozen=True, kw_only=True)
class FixedListConfig(SchemeConfig):
    """Settings of the fixed list.

    Attributes
    ----------
    gamma
        Chance that a token id is green, in (0, 1); rounded down to a multiple of 2**-32.
    delta
        Bonus on the log-probability of green ids, in (0, 20]. None is the hard list: only green ids are drawn, where
        one has positive probability.
    """

    scheme: ClassVar[str] = "fixed-list"
    version: ClassVar[int] = 1
    distortion_free: ClassVar[bool] = False

    gamma: float = 0.5
    delta: float | None = 2.0

    def __post_init__(self) -> None:
        # Stored as floats: 2 and 2.0 must not derive two keys.
        object.__setattr__(self, "gamma", check_share(self.gamma))
        object.__setattr__(self, "delta", check_delta(self.delta))

    @property
    def chance(self) -> float:
        """The exact chance that a coin is green under the null: floor(gamma 2**32) / 2**32."""
        return threshold_of(self.gamma) / 2.0**32


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: FixedListConfig,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Counted positions and colours of many documents that lie end to end; a coin is a token id.

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
        int64, shape (k,), ascending, into `ids`: the first place of each distinct id of a document.
    green
        bool, shape (k, 1).
    """
    positions = np.flatnonzero(first_occurrences(ids, offsets, 1))
    # Documents share the list: each id's word is computed once.
    known, where = np.unique(ids[positions], return_inverse=True)
    none = np.empty((len(known), 0), dtype=np.uint32)
    words = prf.words_at(prf_key, none, known, stream=MEMBER, backend=backend)
    return positions, (words < np.uint64(threshold_of(config.gamma)))[where][:, None]


def observe(ids: Words, prf_key: Words, config: FixedListConfig, *, prompt_length: int = 0) -> Coins:
    """The colours of a text's distinct token ids.

    Guarantee: for a text chosen without knowledge of the key the outcomes are independent, true with chance
    `config.chance`.

    Parameters
    ----------
    ids
        uint32, shape (n,): prompt and text.
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    config
        The key's settings.
    prompt_length
        How many of the ids are the prompt; ids that it shows do not count, since a text may take them over from a
        prompt that was marked.
    """
    offsets = np.array([0, len(ids)], dtype=np.int64)
    positions, green = scan(ids, offsets, prf_key, config)
    return after_prompt(positions, green, len(ids), prompt_length, 0)


def sampler(prf_key: Words, config: FixedListConfig, unmarked: Words) -> Sampler:
    """See `schemes.sampler_of`. Every token is drawn from the tilted law."""
    boost = math.inf if config.delta is None else math.exp(config.delta)

    def draw(
        ids: npt.NDArray[np.int64],
        log_weights: npt.NDArray[np.float32] | npt.NDArray[np.float64],
        pad_token_id: int | None,
    ) -> npt.NDArray[np.int64]:
        from assay.kernels import race, tilted_race

        rows = len(ids)
        key = race.subkeys(prf_key, np.empty((1, 0), dtype=np.uint32))
        return tilted_race.green_winners(
            np.repeat(key[None], rows, axis=0),
            np.zeros((rows, 1), dtype=np.uint32),
            np.ones(rows, dtype=np.bool_),
            plain_subkeys(ids, -1 if pad_token_id is None else pad_token_id, unmarked),
            log_weights,
            streams=(MEMBER, ANCHOR),
            threshold=threshold_of(config.gamma),
            boost=boost,
        )

    return draw
