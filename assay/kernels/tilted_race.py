"""Races after the law was tilted by a second key: one compiled call per step for each scheme that tilts.

Given the tilted law, the winner has it exactly over the keys of the race; see `tilts` for the tilts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assay._compiled import compiled
from assay.kernels import tilts
from assay.kernels.chacha import Words
from assay.kernels.chacha_numba import LANES, _keystream
from assay.kernels.race import LogWeights, _checked, _context_is_new, _peak, unusable_row

SHORT, REPEATED, NEW = 0, 1, 2
"""Kinds of a context: too few tokens; followed by a token before in its history; neither."""

_TILE = 16 * LANES
_TOP = np.float32(1.0) - np.float32(2.0**-24)
_SMALLEST = 2.0**-33


@compiled()
def _contexts(ids, pad, window, contexts, kinds):
    rows, n = ids.shape
    for i in range(rows):
        start = 0
        while start < n and ids[i, start] == pad:
            start += 1
        if n - start < window:
            kinds[i] = SHORT
            continue
        kinds[i] = NEW if _context_is_new(ids[i], start, window) else REPEATED
        for j in range(window):
            contexts[i, j] = np.uint32(ids[i, n - window + j])


def contexts(ids: npt.NDArray[np.int64], pad: int, window: int) -> tuple[Words, npt.NDArray[np.int8]]:
    """The last `window` ids of each row, and whether the context is SHORT, REPEATED or NEW.

    Parameters
    ----------
    ids
        int64, shape (n, t): token ids; a leading run of `pad` in a row is not part of it.
    pad
        The id that fills rows on the left; -1 for none.
    window
        Context width h, >= 1.

    Returns
    -------
    contexts
        uint32, shape (n, h), oldest token first; zeros where the context is short.
    kinds
        int8, shape (n,).
    """
    found = np.zeros((len(ids), window), dtype=np.uint32)
    kinds = np.empty(len(ids), dtype=np.int8)
    _contexts(np.ascontiguousarray(ids, dtype=np.int64), pad, window, found, kinds)
    return found, kinds


@compiled(error_model="numpy")
def _race(key, index, weight, count):
    """argmin E_v / weight_v over the candidates; ties go to the lowest id. The words are those of `race.winners`."""
    tile = np.empty((LANES, 16), np.uint32)
    flat = tile.reshape(_TILE)
    current = -1
    best = np.inf
    winner = -1
    for i in range(count):
        reach = best * weight[i] * (1.0 + 1e-9)  # the margin covers the rounding of the screens below
        if reach <= _SMALLEST:
            continue
        number = index[i] // _TILE
        if number != current:
            _keystream(key, np.uint32(number * LANES), np.uint32(0), np.uint32(0), tile)
            current = number
        r = min((np.float32(flat[index[i] - number * _TILE]) + np.float32(0.5)) * np.float32(2.0**-32), _TOP)
        # E = -log1p(-r) >= r: few pass this screen, and only they are given an exact logarithm.
        if np.float64(r) < reach:
            time = -np.log1p(-np.float64(r)) / weight[i]
            if time < best:
                best = time
                winner = index[i]
    return winner


@compiled()
def _green(keys, anchors, marked, plain, log_weights, member_stream, anchor_stream, threshold, boost, out):
    vocabulary = log_weights.shape[1]
    index = np.empty(vocabulary, np.int64)
    weight = np.empty(vocabulary, np.float64)
    member = np.empty(vocabulary, np.bool_)
    unusable = 0
    for i in range(log_weights.shape[0]):
        peak = _peak(log_weights[i])
        if np.isnan(peak):
            out[i] = -1
            unusable += 1
            continue
        count = tilts.candidates(log_weights[i], peak, index, weight)
        if marked[i]:
            tilts.members(keys[i], anchors[i], member_stream, anchor_stream, threshold, index, count, member)
            if boost < np.inf:
                for j in range(count):
                    weight[j] *= boost if member[j] else 1.0
            elif member[:count].any():
                for j in range(count):
                    weight[j] *= 1.0 if member[j] else 0.0
        out[i] = _race(plain[i], index, weight, count)
    return unusable


@compiled()
def _keyed(keys, marked, plain, log_weights, stream, layers, alpha, out):
    """Tournament of `layers` >= 1, or reweighting by alpha where layers is 0."""
    vocabulary = log_weights.shape[1]
    index = np.empty(vocabulary, np.int64)
    weight = np.empty(vocabulary, np.float64)
    words = np.empty(vocabulary, np.uint32)
    unusable = 0
    for i in range(log_weights.shape[0]):
        peak = _peak(log_weights[i])
        if np.isnan(peak):
            out[i] = -1
            unusable += 1
            continue
        count = tilts.candidates(log_weights[i], peak, index, weight)
        if marked[i] and count > 1:
            tilts.words_of(keys[i], stream, index, count, words)
            weight[:count] /= weight[:count].sum()
            if layers:
                tilts.tournament_law(words, weight, count, layers)
            else:
                tilts.reweight_law(words, index, weight, count, alpha)
        out[i] = _race(plain[i], index, weight, count)
    return unusable


def green_winners(
    keys: Words,
    anchors: Words,
    marked: npt.NDArray[np.bool_],
    plain: Words,
    log_weights: LogWeights,
    *,
    streams: tuple[int, int],
    threshold: int,
    boost: float,
) -> npt.NDArray[np.int64]:
    """Draws from laws in which members of a keyed list weigh `boost` times as much.

    Parameters
    ----------
    keys
        uint32, shape (n, k, 8): subkeys of each row's list; with k > 1 a candidate's list is that of the subkey with
        its smallest word in the second stream.
    anchors
        uint32, shape (n, k): what settles a tie between those words.
    marked
        bool, shape (n,): rows to tilt.
    plain
        uint32, shape (n, 8): subkeys of the race.
    log_weights
        As in `race.winners`.
    streams
        PRF streams of membership and of the choice among the keys.
    threshold
        Members are the candidates whose word is below it.
    boost
        >= 1; infinite: members only, where one of positive probability exists.

    Returns
    -------
    int64, shape (n,).

    Raises
    ------
    ValueError
        As `race.winners`.
    """
    log_weights = _checked(log_weights, len(plain))
    out = np.empty(len(log_weights), dtype=np.int64)
    member, anchor = np.uint32(streams[0]), np.uint32(streams[1])
    if _green(keys, anchors, marked, plain, log_weights, member, anchor, np.uint64(threshold), np.float64(boost), out):
        raise unusable_row(log_weights, out)
    return out


def tournament_winners(
    keys: Words,
    marked: npt.NDArray[np.bool_],
    plain: Words,
    log_weights: LogWeights,
    *,
    stream: int,
    layers: int,
) -> npt.NDArray[np.int64]:
    """Draws from laws after a tournament; layer l reads bit l of each candidate's word.

    Parameters
    ----------
    keys, plain
        uint32, shape (n, 8): subkeys of the bits and of the race.
    marked, log_weights
        As in `green_winners`.
    stream
        PRF stream of the bits.
    layers
        In [1, 32].

    Returns
    -------
    int64, shape (n,).

    Raises
    ------
    ValueError
        As `race.winners`.
    """
    log_weights = _checked(log_weights, len(plain))
    out = np.empty(len(log_weights), dtype=np.int64)
    if _keyed(keys, marked, plain, log_weights, np.uint32(stream), layers, 0.0, out):
        raise unusable_row(log_weights, out)
    return out


def reweighted_winners(
    keys: Words,
    marked: npt.NDArray[np.bool_],
    plain: Words,
    log_weights: LogWeights,
    *,
    stream: int,
    alpha: float,
) -> npt.NDArray[np.int64]:
    """Draws from laws whose mass, in the order of the candidates' words, counts 0 below alpha and 2 above 1 - alpha.

    Parameters
    ----------
    keys, plain
        uint32, shape (n, 8): subkeys of the order and of the race.
    marked, log_weights
        As in `green_winners`.
    stream
        PRF stream of the order.
    alpha
        In (0, 0.5].

    Returns
    -------
    int64, shape (n,).

    Raises
    ------
    ValueError
        As `race.winners`.
    """
    log_weights = _checked(log_weights, len(plain))
    out = np.empty(len(log_weights), dtype=np.int64)
    if _keyed(keys, marked, plain, log_weights, np.uint32(stream), 0, float(alpha), out):
        raise unusable_row(log_weights, out)
    return out
