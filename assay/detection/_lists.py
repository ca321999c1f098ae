"""How much likelier the mark makes each green coin, given text, model and the colours of coins that are not tested.

A position whose law is p and whose list has bonus delta shows token y with probability p_y e^{delta g_y} / (1 + a G),
a = e^delta - 1, G = sum of p over the green. Derivation: docs/explanation/schemes.md, "Green list".
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from assay.detection.bits import Floats, bounded
from assay.detection.model_view import ModelView
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark._coins import MEMBER, Coins, threshold_of
from assay.watermark.fixed_list import FixedListConfig
from assay.watermark.green_list import MAX_DELTA, GreenListConfig, anchors_of

# A red token then costs 1 / 400 and not everything, and the bound on rare candidates stays sharp.
_LARGEST_IN_RATIOS = 6.0


def bonus(delta: float | None) -> float:
    """The bonus in the formulas: the hard list is the largest one."""
    return MAX_DELTA if delta is None else delta


def left_evidence(
    ids: Words, prompt_length: int, coins: Coins, prf_key: Words, config: GreenListConfig, model: ModelView
) -> tuple[Floats, Floats]:
    """Seeding "left": what all positions that share a list say of its coins, and what each list says of its token.

    Returns
    -------
    log_odds
        float64, shape (k, 1): of each coin. The colours of tested coins enter by their mean alone, so the result does
        not depend on them.
    log_ratios
        float64, shape (n_text,): of the token's probability under its list to the mean of that over keys; 0 but for the
        first token after each distinct context. Different contexts have independent lists.
    """
    from assay.kernels import green_ratios, race, tilted_laws

    window, chance = config.window, config.chance
    coins_of: dict[bytes, list[int]] = {}
    for number, position in enumerate((coins.positions + prompt_length).tolist()):
        coins_of.setdefault(ids[position - window : position].tobytes(), []).append(number)
    tokens = ids[coins.positions + prompt_length].astype(np.int64)
    log_odds = np.zeros(len(tokens))
    log_ratios = np.zeros(len(ids) - prompt_length)
    new = first_occurrences(ids, np.array([0, len(ids)], dtype=np.int64), window)
    for first, log_rows in model.rows():
        skipped = max(0, window - prompt_length - first)
        places = np.arange(first + skipped, first + len(log_rows)) + prompt_length
        if len(places) == 0:
            continue
        laws = log_rows[skipped:]
        contexts = np.lib.stride_tricks.sliding_window_view(ids, window)[places - window]
        tested = [np.array(coins_of.get(context.tobytes(), []), dtype=np.int64) for context in contexts]
        keys, threshold = race.subkeys(prf_key, contexts), threshold_of(config.gamma)
        others = tilted_laws.member_masses(
            keys, laws, [tokens[numbers] for numbers in tested], stream=MEMBER, threshold=threshold
        )
        read = np.flatnonzero(new[places - 1])
        log_ratios[places[read] - prompt_length] = green_ratios.green_log_ratios(
            keys[read],
            laws[read],
            ids[places[read]].astype(np.int64),
            stream=MEMBER,
            threshold=threshold,
            delta=min(bonus(config.delta), _LARGEST_IN_RATIOS),
        )
        for row, numbers in enumerate(tested):
            shares = _probabilities(laws[row : row + 1], tokens[numbers])[0]
            seen = tokens[numbers] == ids[places[row]]
            log_odds[numbers] += _evidence(shares, seen, others[row], chance, bonus(config.delta))
    return bounded(log_odds)[:, None], log_ratios


def fixed_log_odds(
    ids: Words, prompt_length: int, coins: Coins, prf_key: Words, config: FixedListConfig, model: ModelView
) -> Floats:
    """One list for all positions: log odds ratio of each token id, float64, shape (k, 1), from every position.

    The colours of tested ids enter by their mean alone, so the result does not depend on them.
    """
    from assay.kernels import race, tilted_laws

    tokens = ids[coins.positions + prompt_length].astype(np.int64)
    key = race.subkeys(prf_key, np.empty((1, 0), dtype=np.uint32))
    log_odds = np.zeros(len(tokens))
    for first, log_rows in model.rows():
        rows = len(log_rows)
        others = tilted_laws.member_masses(
            np.repeat(key, rows, axis=0),
            log_rows,
            [tokens] * rows,
            stream=MEMBER,
            threshold=threshold_of(config.gamma),
        )
        shares = _probabilities(log_rows, tokens)
        seen = tokens == ids[prompt_length + first : prompt_length + first + rows, None]
        log_odds += _evidence(shares, seen, others[:, None], config.chance, bonus(config.delta)).sum(axis=0)
    return bounded(log_odds)[:, None]


def self_log_odds(
    ids: Words, prompt_length: int, coins: Coins, prf_key: Words, config: GreenListConfig, model: ModelView
) -> Floats:
    """Seeding "self": log odds ratio of each coin, float64, shape (k, 1), from the positions that show it.

    Lists of different contexts share coins, so only what each token says of its own coin is used.
    """
    window = config.window
    places = np.arange(max(window, prompt_length), len(ids))
    log_odds = np.zeros(len(coins.positions))
    if len(places) == 0:
        return log_odds[:, None]
    contexts = np.lib.stride_tricks.sliding_window_view(ids, window)[places - window]
    anchors = anchors_of(contexts, ids[places], prf_key)
    number_of = {}
    tested = set((coins.positions + prompt_length).tolist())
    own = own_log_odds(np.exp(np.nan_to_num(model.log_prob, nan=0.0)), config)
    order = 0
    for place, anchor, token in zip(places.tolist(), anchors.tolist(), ids[places].tolist(), strict=True):
        if place in tested:
            number_of[anchor, token] = order
            order += 1
        number = number_of.get((anchor, token))
        if number is not None:
            log_odds[number] += own[place - prompt_length]
    return bounded(log_odds)[:, None]


def own_log_odds(shares: Floats, config: FixedListConfig | GreenListConfig) -> Floats:
    """Log odds ratio of each coin from the token's own probability alone, float64, shape (k,), at least 0.

    The green mass of the other candidates enters by its mean.
    """
    one = shares[:, None]
    return bounded(
        _evidence(one, np.ones_like(one, dtype=np.bool_), config.chance * (1.0 - one), 0.0, bonus(config.delta))
    )[:, 0]


def _probabilities(log_rows: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> Floats:
    """Probabilities of some ids under each row, shape (rows, ids); 0 for ids beyond the model's vocabulary."""
    known = tokens < log_rows.shape[1]
    shares = np.zeros((len(log_rows), len(tokens)))
    shares[:, known] = np.exp(log_rows[:, tokens[known]].astype(np.float64))
    return shares


def _evidence(
    shares: Floats, seen: npt.NDArray[np.bool_], others: Floats | float, chance: float, delta: float
) -> Floats:
    """Log of P(token drawn | coin green) / P(token drawn | coin red) at one position, for each coin of the last axis.

    shares: the coins' probabilities. seen: whether the token drawn is the coin's. others: green mass of candidates that
    are not tested; tested ones other than the coin itself add `chance` times their probability.
    """
    a = math.expm1(delta)
    green = others + chance * (shares.sum(axis=-1, keepdims=True) - shares)
    found: Floats = np.nan_to_num(np.where(seen, delta, 0.0) - np.log1p(a * shares / (1.0 + a * green)))
    return found
