"""What each token says, as likelihood ratios that may be multiplied: the material of streams and of localisation.

Column g of `Evidence.log_ratios` is one alternative: given the text and all earlier factors, the exp of each entry has
mean at most 1 under H0. So products over any tokens are e-values, and running products test martingales.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.detection import bits, gumbel
from assay.kernels.chacha import Words
from assay.watermark.gumbel import race_scores, sum_scores
from assay.watermark.schemes import SchemeConfig

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

SCHEMES = ("dipmark", "dual-gumbel", "fixed-list", "green-list", "gumbel", "inverse-transform", "tournament")
"""Schemes whose tokens bring evidence one by one."""

MODEL_AWARE = ("dual-gumbel", "fixed-list", "green-list", "gumbel", "tournament")
"""Those of them for which a token's own probability under a model says how much it can show."""


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
        If the scheme is none of `SCHEMES`, or log_prob is given for none of `MODEL_AWARE`.
    """
    window_of(config)
    if log_prob is not None and config.scheme not in MODEL_AWARE:
        raise ValueError(
            f"log_prob is used for the schemes {', '.join(MODEL_AWARE)} only, got {config.tag!r}. Leave it out."
        )
    found = import_module(type(config).__module__).observe(ids, prf_key, config, prompt_length=prompt_length)
    if log_prob is None:
        ratios = _of_strengths(found, config)
    else:
        log_p = np.minimum(np.nan_to_num(log_prob[found.positions], nan=0.0), 0.0)
        verbatim = _given_probabilities(found, config, log_p)[:, :, None]  # (k, ways to be marked, 1)
        rates = gumbel._EDIT_RATES
        ratios = np.logaddexp(np.log1p(-rates) + verbatim, np.log(rates)).reshape(
            len(log_p), verbatim.shape[1] * len(rates)
        )
    return Evidence(found.positions, ratios, found.n_tokens, found.n_repeats_dropped)


def _of_strengths(found: Any, config: Any) -> Floats:
    """Log ratios without a model, float64, shape (k, alternatives)."""
    if config.scheme == "gumbel":
        ratios: Floats = np.log1p(-gumbel._TILTS) + sum_scores(found.words)[:, None] * gumbel._TILTS
        return ratios
    if config.scheme == "dual-gumbel":
        from assay.detection.dual_gumbel import tilted_log_ratios

        return tilted_log_ratios(found)
    if config.scheme == "inverse-transform":
        from assay.detection.inverse_transform import density_log_ratios

        return density_log_ratios(found.uniforms, found.places)
    chance = getattr(config, "chance", 0.5)
    up = np.log1p(bits._STRENGTHS * (1.0 - chance) / chance)
    down = np.log1p(-bits._STRENGTHS)
    ones = found.outcomes.sum(axis=1)[:, None]
    coins: Floats = ones * up + (found.outcomes.shape[1] - ones) * down
    return coins


def _given_probabilities(found: Any, config: Any, log_p: Floats) -> Floats:
    """Log ratios of verbatim text whose tokens have these probabilities, float64, shape (k, ways to be marked)."""
    if config.scheme == "gumbel":
        log_p = gumbel.clip_probabilities(log_p)
        race: Floats = (-log_p - np.expm1(-log_p) * race_scores(found.words))[:, None]
        return race
    if config.scheme == "dual-gumbel":
        from assay.detection.dual_gumbel import shared_log_ratios

        return shared_log_ratios(found, gumbel.clip_probabilities(log_p)).T
    p = np.exp(log_p)
    if config.scheme == "tournament":
        log_odds, chance = _layer_log_odds(p, config.layers), 0.5
    else:
        from assay.detection._lists import own_log_odds

        log_odds, chance = own_log_odds(p, config)[:, None], config.chance
    verbatim: Floats = bits.log_ratios(found.outcomes, log_odds, chance).sum(axis=1, keepdims=True)
    return verbatim


def _layer_log_odds(p: Floats, layers: int) -> Floats:
    """Log odds of each layer's bit for a token of probability p, float64, shape (k, layers).

    Exact for the first layer: a match keeps the token in proportion to 1 + g - sum g p, whose mean over the other bits
    is (3 - p) / 2 for g = 1 and (1 + p) / 2 for g = 0. Later layers meet the token with the probability that it has on
    average come to by then, if the others are many: any function of p is valid, this one is near the best.
    """
    log_odds = np.empty((len(p), layers))
    for layer in range(layers):
        log_odds[:, layer] = np.log((3.0 - p) / (1.0 + p))
        p = p * (1.0 + (1.0 - p) ** 2 / 4.0)
    return log_odds
