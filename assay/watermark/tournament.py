"""Tournament sampling (SynthID-Text, two candidates a match, non-distortionary): m keyed bits per candidate.

Layer l replaces p by p (1 + g_l - sum_v g_l(v) p(v)). Over keys the law of the text is the model's; under H0 the m bits
of each distinct (context, token) are independent fair coins. Reference: Dathathri et al. (2024), Nature 634, 818-823.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.watermark._coins import LAYERS, Coins, after_prompt, check_window, context_words, plain_subkeys
from assay.watermark.schemes import Sampler, SchemeConfig, register


@register
@dataclass(frozen=True, kw_only=True)
class TournamentConfig(SchemeConfig):
    """Settings of the tournament.

    Attributes
    ----------
    window
        Context width h, in [1, 64]: how many preceding tokens key the bits.
    layers
        Layers m of the tournament, in [1, 32]. Each adds evidence, less than the one before.
    """

    scheme: ClassVar[str] = "tournament"
    version: ClassVar[int] = 1

    window: int = 4
    layers: int = 30

    def __post_init__(self) -> None:
        check_window(self.window)
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or not 1 <= self.layers <= 32:
            raise ValueError(f"layers must be an integer in [1, 32], got {self.layers!r}.")


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: TournamentConfig,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Counted positions and bits of many documents that lie end to end.

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
    bits
        bool, shape (k, layers): bit l of the PRF word is that of layer l, the lowest first.
    """
    positions, words = context_words(ids, offsets, prf_key, config.window, LAYERS, backend=backend)
    bits = (words[:, None] >> np.arange(config.layers, dtype=np.uint32)) & np.uint32(1)
    return positions, bits.astype(np.bool_)


def observe(ids: Words, prf_key: Words, config: TournamentConfig, *, prompt_length: int = 0) -> Coins:
    """The bits of a text's distinct (context, token) pairs.

    Guarantee: for a text chosen without knowledge of the key the outcomes are independent fair coins.

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
    positions, bits = scan(ids, offsets, prf_key, config)
    return after_prompt(positions, bits, len(ids), prompt_length, config.window)


def sampler(prf_key: Words, config: TournamentConfig, unmarked: Words) -> Sampler:
    """See `schemes.sampler_of`.

    Guarantee: over uniform keys and seeds a text has the law of the model, within the resolution of the PRF words.
    Tokens with too short a context, or one that was followed by a token before, are drawn from the model's law itself.
    """

    def draw(
        ids: npt.NDArray[np.int64],
        log_weights: npt.NDArray[np.float32] | npt.NDArray[np.float64],
        pad_token_id: int | None,
    ) -> npt.NDArray[np.int64]:
        from assay.kernels import race, tilted_race

        pad = -1 if pad_token_id is None else pad_token_id
        contexts, kinds = tilted_race.contexts(ids, pad, config.window)
        return tilted_race.tournament_winners(
            race.subkeys(prf_key, contexts),
            kinds == tilted_race.NEW,
            plain_subkeys(ids, pad, unmarked),
            log_weights,
            stream=LAYERS,
            layers=config.layers,
        )

    return draw
