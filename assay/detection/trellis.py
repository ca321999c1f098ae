"""Decoding a tail-biting trellis code: the best of all 2^bits payloads, and the sum over all of them, both exact.

A payload's registers are K consecutive bits each, indices modulo its length (`watermark.payload.registers`); its score
is the sum of one entry per step of a table of scores. Reference: Viterbi (1967); Bahl, Cocke, Jelinek and Raviv (1974)
(the sum); Ma and Wolf (1986): one pass for each of the 2^(K - 1) states that a path may start and must end in.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def best_payload(scores: Floats) -> tuple[int, float]:
    """The payload with the largest score, and that score; the maximum-likelihood payload if scores are likelihoods.

    Parameters
    ----------
    scores
        float64, shape (bits, 2^K), K <= bits: row j is the score of each register at step j. -inf is allowed.

    Returns
    -------
    payload, score

    Raises
    ------
    ValueError
        If the shape does not fit a trellis or an entry is NaN or +inf.

    Notes
    -----
    O(bits 4^K) time.
    """
    bits, half = _checked(scores)
    # best[a, s]: the largest score of a path from state a to state s; a register is the last state and one new bit.
    best = np.where(np.eye(half, dtype=bool), 0.0, -np.inf)
    higher = np.empty((bits, half, half), dtype=np.bool_)
    for j, row in enumerate(scores):
        path = np.repeat(best, 2, axis=1) + row  # over registers r, which come from state r >> 1
        low, high = path[:, :half], path[:, half:]  # the two registers that end in state s: s and s + half
        higher[j] = high > low
        best = np.maximum(low, high)
    start = int(np.argmax(np.diagonal(best)))
    payload, state = 0, start
    for j in range(bits - 1, -1, -1):
        register = state + half * int(higher[j, start, state])
        payload |= (register & 1) << j
        state = register >> 1
    return payload, float(best[start, start])


def log_mean_exp(scores: Floats) -> float:
    """log of the mean of exp(score) over all 2^bits payloads, by the sum-product recursion.

    Terms that underflow are left out, at worst all but the largest: an e-value may come out smaller, never larger.

    Parameters
    ----------
    scores
        As `best_payload`.
    """
    bits, half = _checked(scores)
    total = np.eye(half)
    log_scale = 0.0
    for row in scores:
        peak = float(row.max())
        if peak == -math.inf:
            return -math.inf
        # In units of the largest entry: what underflows is 10^300 times smaller than what stays.
        path = np.repeat(total, 2, axis=1) * np.exp(row - peak)
        total = path[:, :half] + path[:, half:]
        size = float(total.max())
        if size == 0.0:
            break
        total /= size
        log_scale += peak + math.log(size)
    trace = float(np.trace(total))
    log_sum = log_scale + math.log(trace) if trace > 0.0 else best_payload(scores)[1]
    return log_sum - bits * math.log(2.0)


def _checked(scores: Floats) -> tuple[int, int]:
    """The number of steps and of states."""
    bits, symbols = scores.shape
    if symbols < 2 or symbols & (symbols - 1) or symbols > 1 << bits:
        raise ValueError(f"scores must have shape (bits, 2**K) with 1 <= K <= bits, got {scores.shape}.")
    if np.any(np.isnan(scores)) or np.any(scores == np.inf):
        raise ValueError("scores must be finite or -inf.")
    return bits, symbols // 2
