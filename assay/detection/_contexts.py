"""What the tests of tournament and DiPmark share: one token for each distinct context, and its law under the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from assay.detection import bits, combine
from assay.detection.bits import Floats
from assay.detection.model_view import ModelView
from assay.detection.result import TestResult
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark._coins import Coins

Laws = npt.NDArray[np.float32]
OfToken = Callable[[Words, Laws, npt.NDArray[np.int64]], Floats]
"""(subkeys (k, 8), log-probabilities (k, V), tokens (k,)) -> one value or one row of values for each token."""


def first_of_context(ids: Words, prompt_length: int, coins: Coins, window: int) -> Coins:
    """The coins that follow the first occurrence of their context, as the sampler marks them.

    Parameters
    ----------
    ids
        uint32, shape (n,): prompt and text.
    prompt_length
        How many of them are the prompt.
    coins
        Coins of the text, one for each distinct (context, token).
    window
        Context width h.
    """
    new = first_occurrences(ids, np.array([0, len(ids)], dtype=np.int64), window)
    kept = new[coins.positions + prompt_length - 1]
    return replace(
        coins,
        positions=coins.positions[kept],
        outcomes=coins.outcomes[kept],
        n_repeats_dropped=coins.n_repeats_dropped + int(np.sum(~kept)),
    )


def context_test(
    ids: Words,
    prompt_length: int,
    coins: Coins,
    window: int,
    prf_key: Words,
    *,
    test: str,
    model: ModelView | None,
    chances: OfToken,
    log_ratios: OfToken,
    scheme: str,
    assumptions: tuple[str, ...],
) -> TestResult:
    """The tests of a scheme without distortion whose outcomes are fair coins.

    Guarantee of "model-aware": `chances` reads the text, the model and the words of OTHER candidates; given those the
    tested outcomes are still independent fair coins. Guarantee of "robust": `log_ratios` are ratios of a token's
    probability under the key to that under the model, whose mean over keys is 1; different contexts have independent
    words, and each context is read once. So the products have mean 1.

    Parameters
    ----------
    ids, prompt_length, test, model
        As in `testers.Tester.test_ids`.
    coins
        Of the text, one for each distinct (context, token).
    window
        Context width h.
    prf_key
        uint32, shape (8,).
    chances
        Chances of the outcomes of a marked token, shape (k, m).
    log_ratios
        Shape (k,).
    scheme, assumptions
        As in `bits.sum_test`.
    """
    plain = bits.sum_test(coins, 0.5, scheme=scheme, assumptions=assumptions)
    if model is None or test == "sum" or (test == "auto" and len(coins.positions) == 0):
        return plain
    from assay.kernels import race

    coins = first_of_context(ids, prompt_length, coins, window)
    log_odds = np.zeros(coins.outcomes.shape)
    ratios = np.zeros(len(coins.positions))
    for first, log_rows in model.rows():
        numbers = np.flatnonzero((coins.positions >= first) & (coins.positions < first + len(log_rows)))
        if len(numbers) == 0:
            continue
        places = coins.positions[numbers] + prompt_length
        keys = race.subkeys(prf_key, np.lib.stride_tricks.sliding_window_view(ids, window)[places - window])
        laws, tokens = log_rows[coins.positions[numbers] - first], ids[places].astype(np.int64)
        if test != "robust":
            log_odds[numbers] = bits.log_odds_of(chances(keys, laws, tokens), 0.5)
        if test != "model-aware":
            ratios[numbers] = log_ratios(keys, laws, tokens)
    aware = bits.model_aware_test(coins, log_odds, 0.5, scheme=scheme, assumptions=assumptions)
    robust = bits.robust_test(coins, ratios, scheme=scheme, assumptions=assumptions)
    if test == "model-aware":
        return aware
    return robust if test == "robust" else combine.best_of((plain, aware, robust), test=f"{scheme}-best-of-three")
