"""What each token says, as likelihood ratios that may be multiplied: the material of streams and of localisation.

Column g of `Evidence.log_ratios` is one alternative: given the text and all earlier factors, the exp of each entry has
mean at most 1 under H0. So products over any tokens are e-values, and running products test martingales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.detection import bits, gumbel
from assay.kernels.chacha import Words
from assay.watermark.gumbel import GumbelConfig, observe, race_scores, sum_scores
from assay.watermark.schemes import SchemeConfig

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

SCHEMES = ("dipmark", "fixed-list", "green-list", "gumbel", "tournament")
"""Schemes whose tokens bring evidence one by one."""


@dataclass(frozen=True)
class Evidence:
    """Log likelihood ratios of the counted tokens of a text.

    Attributes
    ----------
    positions
        int64, shape (k,), ascending: the tokens that count, from the first after the prompt.
    log_ratios
        float64, shape (k, alternatives), finite: no single token can rule the mark out.
    n_tokens
        Tokens in the text.
    n_repeats_dropped
        Tokens left out because their coin was counted before.
    """

    positions: Counts
    log_ratios: Floats
    n_tokens: int
    n_repeats_dropped: int


def window_of(config: SchemeConfig) -> int:
    """How many tokens stand before the first that has a coin.

    Raises
    ------
    ValueError
        If the scheme's tokens do not bring evidence one by one.
    """
    if config.scheme not in SCHEMES:
        raise ValueError(f"key must be for one of the schemes {', '.join(SCHEMES)}, got {config.tag!r}.")
    return int(getattr(config, "window", 0))


def gather(
    ids: Words, prf_key: Words, config: Any, *, prompt_length: int = 0, log_prob: Floats | None = None
) -> Evidence:
    """The evidence of a text under one key.

    Guarantee: for any probabilities computed from the text alone, each factor has mean at most 1 under the null.

    Parameters
    ----------
    ids
        uint32, shape (n,): prompt and text.
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    config
        The key's settings.
    prompt_length
        How many of the ids are the prompt.
    log_prob
        float64, shape (n - prompt_length,): natural logarithms of the tokens' probabilities under a model, NaN where
        unknown; then the alternatives are edit rates, as in `gumbel.robust_test`. None: the alternatives are the
        strengths of the mark, as in the e-values of the model-free tests.

    Returns
    -------
    Evidence

    Raises
    ------
    ValueError
        If the scheme is none of `SCHEMES`, or log_prob is given for another scheme than "gumbel".
    """
    window_of(config)
    if isinstance(config, GumbelConfig):
        found = observe(ids, prf_key, config, prompt_length=prompt_length)
        if log_prob is None:
            ratios = np.log1p(-gumbel._TILTS) + sum_scores(found.words)[:, None] * gumbel._TILTS
        else:
            log_p = gumbel.clip_probabilities(np.nan_to_num(log_prob[found.positions], nan=0.0))
            plain = -log_p - np.expm1(-log_p) * race_scores(found.words)
            rates = gumbel._EDIT_RATES
            ratios = np.logaddexp(np.log1p(-rates) + plain[:, None], np.log(rates))
        return Evidence(found.positions, ratios, found.n_tokens, found.n_repeats_dropped)
    if log_prob is not None:
        raise ValueError(f"log_prob is used for scheme 'gumbel' only, got {config.tag!r}. Leave it out.")
    coins = _observer(config.scheme)(ids, prf_key, config, prompt_length=prompt_length)
    chance = getattr(config, "chance", 0.5)
    up = np.log1p(bits._STRENGTHS * (1.0 - chance) / chance)
    down = np.log1p(-bits._STRENGTHS)
    ones = coins.outcomes.sum(axis=1)[:, None]
    return Evidence(
        coins.positions, ones * up + (coins.outcomes.shape[1] - ones) * down, coins.n_tokens, coins.n_repeats_dropped
    )


def _observer(scheme: str) -> Any:
    from assay.watermark import dipmark, fixed_list, green_list, tournament

    return {
        "dipmark": dipmark.observe,
        "fixed-list": fixed_list.observe,
        "green-list": green_list.observe,
        "tournament": tournament.observe,
    }[scheme]
