"""Reweighting by a keyed permutation (DiPmark; alpha = 1/2 is the unbiased gamma-reweight): late candidates gain.

In the order of their PRF words the model's mass counts 0 up to alpha, 1 up to 1 - alpha, 2 above. Over keys the law of
the text is the model's. The detector sees whether a token's word is in the upper half: under H0 a fair coin, exactly.
Reference: Wu et al. (2024), arXiv:2310.07710, definition of DiP-reweight; Hu et al. (2024), arXiv:2310.10669.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.watermark._coins import (
    ORDER,
    Coins,
    after_prompt,
    check_real,
    check_window,
    context_words,
    plain_subkeys,
)
from assay.watermark.schemes import Sampler, SchemeConfig, register

CUT = np.uint32(2**31)
"""A word at or above this is in the upper half of the order."""


@register
@dataclass(frozen=True, kw_only=True)
class DipmarkConfig(SchemeConfig):
    """Settings of the reweighting.

    Attributes
    ----------
    window
        Context width h, in [1, 64]: how many preceding tokens key the permutation.
    alpha
        Where mass begins to count, in (0, 0.5]. 0.5 marks most; near 0 nearly nothing changes.
    """

    scheme: ClassVar[str] = "dipmark"
    version: ClassVar[int] = 1

    window: int = 4
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_window(self.window)
        # Stored as a float: equal settings must derive one key.
        alpha = check_real("alpha", self.alpha, "(0, 0.5]; 0 would mark nothing", low=0.0, high=0.5)
        object.__setattr__(self, "alpha", alpha)


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: DipmarkConfig,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Counted positions and halves of many documents that lie end to end.

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
        int64, shape (k,), ascending, into `ids`: the first place of each distinct (context, token) of a document.
    upper
        bool, shape (k, 1): the token's word is at least 2**31.
    """
    positions, words = context_words(ids, offsets, prf_key, config.window, ORDER, backend=backend)
    return positions, (words >= CUT)[:, None]


def observe(ids: Words, prf_key: Words, config: DipmarkConfig, *, prompt_length: int = 0) -> Coins:
    """The halves of a text's distinct (context, token) pairs.

    Guarantee: for a text chosen without knowledge of the key the outcomes are independent fair coins. Words, not ranks:
    ranks within one permutation would be drawn without replacement.

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
    positions, upper = scan(ids, offsets, prf_key, config)
    return after_prompt(positions, upper, len(ids), prompt_length, config.window)


def sampler(prf_key: Words, config: DipmarkConfig, unmarked: Words) -> Sampler:
    """See `schemes.sampler_of`.

    Guarantee: over uniform keys and seeds a text has the law of the model, up to 2**-32 per id (two words may be
    equal; the lower id then comes first). Tokens with too short a context, or one that was followed by a token before,
    are drawn from the model's law itself.
    """

    def draw(
        ids: npt.NDArray[np.int64],
        log_weights: npt.NDArray[np.float32] | npt.NDArray[np.float64],
        pad_token_id: int | None,
    ) -> npt.NDArray[np.int64]:
        from assay.kernels import race, tilted_race

        pad = -1 if pad_token_id is None else pad_token_id
        contexts, kinds = tilted_race.contexts(ids, pad, config.window)
        return tilted_race.reweighted_winners(
            race.subkeys(prf_key, contexts),
            kinds == tilted_race.NEW,
            plain_subkeys(ids, pad, unmarked),
            log_weights,
            stream=ORDER,
            alpha=config.alpha,
        )

    return draw
