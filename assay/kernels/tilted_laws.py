"""What a detector that knows the model computes from a key's whole lists: masses, chances of outcomes, law ratios.

Nothing here looks at the outcome of the coins that are then tested, except the ratios, whose mean over keys is 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assay._compiled import compiled
from assay.kernels import tilts
from assay.kernels.chacha import Words
from assay.kernels.race import LogWeights, _peak


@compiled()
def _law(row, index, weight):
    """The candidates of one row, their probabilities, and how many there are; -1 where the row is no law."""
    peak = _peak(row)
    if np.isnan(peak):
        return -1
    count = tilts.candidates(row, peak, index, weight)
    weight[:count] /= weight[:count].sum()
    return count


@compiled()
def _place(index, count, token):
    """Where a token stands among the candidates; -1 if it is none of them."""
    if count < 0:
        return -1
    where = np.searchsorted(index[:count], token)
    return where if where < count and index[where] == token else -1


@compiled()
def _member_masses(keys, log_rows, stream, threshold, starts, excluded, out):
    vocabulary = log_rows.shape[1]
    index = np.empty(vocabulary, np.int64)
    weight = np.empty(vocabulary, np.float64)
    words = np.empty(vocabulary, np.uint32)
    for i in range(log_rows.shape[0]):
        out[i] = np.nan
        count = _law(log_rows[i], index, weight)
        if count < 0:
            continue
        for j in range(starts[i], starts[i + 1]):
            where = _place(index, count, excluded[j])
            if where >= 0:
                weight[where] = 0.0
        tilts.words_of(keys[i], stream, index, count, words)
        inside = 0.0
        for j in range(count):
            inside += weight[j] if words[j] < threshold else 0.0
        out[i] = inside


@compiled()
def _log_ratios(keys, log_rows, tokens, stream, layers, alpha, out):
    vocabulary = log_rows.shape[1]
    index = np.empty(vocabulary, np.int64)
    weight = np.empty(vocabulary, np.float64)
    words = np.empty(vocabulary, np.uint32)
    for i in range(log_rows.shape[0]):
        out[i] = 0.0
        count = _law(log_rows[i], index, weight)
        where = _place(index, count, tokens[i])
        if where < 0:
            continue
        before = weight[where]
        tilts.words_of(keys[i], stream, index, count, words)
        if layers:
            tilts.tournament_law(words, weight, count, layers)
        else:
            tilts.reweight_law(words, index, weight, count, alpha)
        out[i] = np.log(weight[where] / before) if weight[where] > 0.0 else -np.inf


def member_masses(
    keys: Words,
    log_rows: LogWeights,
    excluded: list[npt.NDArray[np.int64]],
    *,
    stream: int,
    threshold: int,
) -> npt.NDArray[np.float64]:
    """The probability that each row's law gives to the members of its list, some ids left out.

    Parameters
    ----------
    keys
        uint32, shape (n, 8).
    log_rows
        float32 or float64, shape (n, V): log-probabilities.
    excluded
        n arrays of ids whose membership must not be looked at.
    stream, threshold
        As in `tilted_race.green_winners`.

    Returns
    -------
    float64, shape (n,), in [0, 1]; NaN for a row that is no law.
    """
    out = np.empty(len(log_rows), dtype=np.float64)
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in excluded])]).astype(np.int64)
    flat = np.concatenate([*excluded, np.empty(0, dtype=np.int64)]).astype(np.int64)
    rows = np.ascontiguousarray(log_rows)
    _member_masses(keys, rows, np.uint32(stream), np.uint64(threshold), starts, flat, out)
    return out


def tournament_log_ratios(
    keys: Words, log_rows: LogWeights, tokens: npt.NDArray[np.int64], *, stream: int, layers: int
) -> npt.NDArray[np.float64]:
    """log of (probability of the token after the tournament / before it).

    Arguments as in `tilted_race.tournament_winners`.

    Returns
    -------
    float64, shape (n,), in [-inf, layers * log 2]; 0 where the law gives the token no probability.
    """
    out = np.empty(len(log_rows), dtype=np.float64)
    _log_ratios(keys, np.ascontiguousarray(log_rows), tokens, np.uint32(stream), layers, 0.0, out)
    return out


def reweighted_log_ratios(
    keys: Words, log_rows: LogWeights, tokens: npt.NDArray[np.int64], *, stream: int, alpha: float
) -> npt.NDArray[np.float64]:
    """log of (probability of the token after reweighting / before it).

    Arguments as in `tilted_race.reweighted_winners`.

    Returns
    -------
    float64, shape (n,), in [-inf, log 2]; 0 where the law gives the token no probability.
    """
    out = np.empty(len(log_rows), dtype=np.float64)
    _log_ratios(keys, np.ascontiguousarray(log_rows), tokens, np.uint32(stream), 0, float(alpha), out)
    return out


@compiled()
def _tournament_chances(keys, log_rows, tokens, stream, out):
    vocabulary = log_rows.shape[1]
    index = np.empty(vocabulary, np.int64)
    weight = np.empty(vocabulary, np.float64)
    words = np.empty(vocabulary, np.uint32)
    for i in range(log_rows.shape[0]):
        out[i] = 0.5
        count = _law(log_rows[i], index, weight)
        where = _place(index, count, tokens[i])
        if where < 0:
            continue
        tilts.words_of(keys[i], stream, index, count, words)
        words[where] = np.uint32(0)  # the token's own bits are not looked at
        own = weight[where]
        weight[where] = 0.0
        for layer in range(out.shape[1]):
            shift = np.uint32(layer)
            others = 0.0
            for j in range(count):
                others += weight[j] * np.float64((words[j] >> shift) & np.uint32(1))
            chance = (2.0 - own - others) / (3.0 - own - 2.0 * others)
            out[i, layer] = chance
            green = others + own * chance
            for j in range(count):
                weight[j] *= 1.0 - green + np.float64((words[j] >> shift) & np.uint32(1))
            own *= 1.0 - green + chance


def tournament_chances(
    keys: Words, log_rows: LogWeights, tokens: npt.NDArray[np.int64], *, stream: int, layers: int
) -> npt.NDArray[np.float64]:
    """Chances that the bits of a token that won its tournament are set, from the law and the OTHER candidates' bits.

    Given the bits of the others and the laws of the layers before, exact for one layer; the token's own bits in earlier
    layers are replaced by their chances, so that the result never depends on them.

    Parameters
    ----------
    keys, log_rows, tokens, stream
        As in `tournament_log_ratios`.
    layers
        In [1, 32].

    Returns
    -------
    float64, shape (n, layers), in [1/2, 1]; 1/2 where the law gives the token no probability.
    """
    out = np.empty((len(log_rows), layers), dtype=np.float64)
    _tournament_chances(keys, np.ascontiguousarray(log_rows), tokens, np.uint32(stream), out)
    return out


@compiled()
def _counted(mass, alpha):
    return max(mass - alpha, 0.0) + max(mass - (1.0 - alpha), 0.0)


@compiled()
def _reweighted_chances(keys, log_rows, tokens, stream, alpha, out):
    vocabulary = log_rows.shape[1]
    index = np.empty(vocabulary, np.int64)
    weight = np.empty(vocabulary, np.float64)
    words = np.empty(vocabulary, np.uint32)
    masses = np.empty(tilts.BUCKETS, np.float64)
    for i in range(log_rows.shape[0]):
        out[i] = 0.5
        count = _law(log_rows[i], index, weight)
        where = _place(index, count, tokens[i])
        if where < 0:
            continue
        tilts.words_of(keys[i], stream, index, count, words)
        own = weight[where]
        weight[where] = 0.0  # its word is not looked at: it adds nothing to any bucket
        masses[:] = 0.0
        for j in range(count):
            masses[words[j] >> np.uint32(20)] += weight[j]
        before = 0.0
        half = 0.0
        total = 0.0
        for bucket in range(tilts.BUCKETS):
            middle = before + 0.5 * masses[bucket]
            gain = _counted(middle + own, alpha) - _counted(middle, alpha)
            total += gain
            half += gain if bucket >= tilts.BUCKETS // 2 else 0.0
            before += masses[bucket]
        if total > 0.0:
            out[i] = half / total


def reweighted_chances(
    keys: Words, log_rows: LogWeights, tokens: npt.NDArray[np.int64], *, stream: int, alpha: float
) -> npt.NDArray[np.float64]:
    """Chances that a reweighted token's word is in the upper half, from the law and the OTHER candidates' words.

    Parameters
    ----------
    keys, log_rows, tokens, stream, alpha
        As in `reweighted_log_ratios`.

    Returns
    -------
    float64, shape (n,), in [1/2, 1] up to rounding; 1/2 where the law gives the token no probability.
    """
    out = np.empty(len(log_rows), dtype=np.float64)
    _reweighted_chances(keys, np.ascontiguousarray(log_rows), tokens, np.uint32(stream), float(alpha), out)
    return out
