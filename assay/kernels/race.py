"""The keyed exponential race: X = argmin E_v / p_v, which is Gumbel-max sampling with noise from the PRF.

X ~ p exactly over keys. Reference: Aaronson (2022); Maddison, Tarlow, Minka (2014), arXiv:1411.0030.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from assay._compiled import compiled
from assay.kernels.chacha import PAD, Words
from assay.kernels.chacha_numba import LANES, _keystream, _subkeys
from assay.kernels.chacha_numba import subkeys as subkeys
from assay.kernels.prf import expand, race_times

LogWeights = npt.NDArray[np.float32] | npt.NDArray[np.float64]

_TILE = 16 * LANES
_SLOWEST = 16.64  # above every race time: r <= 1 - 2**-24
_LOG2_SMALLEST_R = -33.0
_LOG2_E = np.float32(np.log2(np.e))
# Covers the rounding of the screens in single precision, which is below 2e-5.
_MARGIN = np.float32(1e-3)
_NO_ROWS = np.empty(0, dtype=np.int64)


@numba.njit(inline="always")
def _log2_weight(row, peak, v):
    return np.float32(row[v] - peak) * _LOG2_E


@numba.njit(inline="always")
def _log2_below(bits):
    """A lower bound of log2 of a float in (0, 1): its bits, read as an integer, are linear between powers of two."""
    return np.float32(bits) * np.float32(2.0**-23) - np.float32(127.0)


@compiled()
def _peak(row):
    """The largest value; NaN if one is NaN or +inf, or all are -inf."""
    # One maximum per lane: a single one would be a chain of comparisons, which LLVM may not reorder.
    lanes = np.full(64, -np.inf, row.dtype)
    whole = row.shape[0] // 64 * 64
    for start in range(0, whole, 64):
        for j in range(64):
            lanes[j] = row[start + j] if row[start + j] > lanes[j] else lanes[j]
    for v in range(whole, row.shape[0]):
        lanes[0] = max(lanes[0], row[v])
    peak = lanes.max()
    unusable = 0
    for v in range(row.shape[0]):
        unusable += not row[v] < np.inf
    return peak if unusable == 0 and peak > -np.inf else peak * row.dtype.type(np.nan)


@compiled(error_model="numpy")
def _race(key, row):
    """The winner of one row's race; -1 where the row cannot be drawn from."""
    tile = np.empty((LANES, 16), np.uint32)
    words = tile.reshape(_TILE)
    r = np.empty(_TILE, np.float32)
    bits = r.view(np.int32)
    top = np.float32(1.0) - np.float32(2.0**-24)
    peak = _peak(row)
    if np.isnan(peak):
        return -1
    best = _SLOWEST
    winner = -1
    for start in range(0, row.shape[0], _TILE):
        count = min(_TILE, row.shape[0] - start)
        log2_best = np.float32(np.log2(best)) + _MARGIN
        # Where even the smallest r would lose, the keystream is not needed: nearly everywhere after top-k or top-p.
        passed = 0
        for j in range(count):
            passed += np.float32(_LOG2_SMALLEST_R) < log2_best + _log2_weight(row, peak, start + j)
        if passed == 0:
            continue
        _keystream(key, np.uint32(start // 16), np.uint32(0), np.uint32(0), tile)
        for j in range(_TILE):
            r[j] = min((np.float32(words[j]) + np.float32(0.5)) * np.float32(2.0**-32), top)
        # E = -log1p(-r) >= r, so v can win only if log2(r) < log2(best * weight). Few pass this screen, and only they
        # are given an exact logarithm and exponential.
        passed = 0
        for j in range(count):
            passed += _log2_below(bits[j]) < log2_best + _log2_weight(row, peak, start + j)
        if passed == 0:
            continue
        for j in range(count):
            if _log2_below(bits[j]) < log2_best + _log2_weight(row, peak, start + j):
                time = -np.log1p(-np.float64(r[j])) / np.exp(np.float64(row[start + j]) - np.float64(peak))
                if time < best:
                    best = time
                    log2_best = np.float32(np.log2(best)) + _MARGIN
                    winner = start + j
    return winner


@compiled()
def _winners(keys, log_weights, out):
    """Winners of all rows; returns how many cannot be drawn from."""
    unusable = 0
    for i in range(log_weights.shape[0]):
        out[i] = _race(keys[i], log_weights[i])
        unusable += out[i] < 0
    return unusable


@compiled()
def _context_is_new(row, start, window):
    """Whether `window` tokens stand from `start` on, the last of which have not been followed by a token before."""
    n = row.shape[0]
    if n - start < window:
        return False
    for end in range(start + window - 1, n - 1):
        same = 0
        while same < window and row[end - same] == row[n - 1 - same]:
            same += 1
        if same == window:
            return False
    return True


@compiled()
def _marked_keys(ids, pad, window, prf_key, keys, marked):
    rows, n = ids.shape
    groups = np.full((rows, (window + 3) // 4, 4), PAD)
    unmarked = 0
    for i in range(rows):
        start = 0
        while start < n and ids[i, start] == pad:
            start += 1
        marked[i] = _context_is_new(ids[i], start, window)
        unmarked += not marked[i]
        if marked[i]:
            for j in range(window):  # as `chacha.context_groups`: a short last group stands at its right end
                g = j // 4
                groups[i, g, 4 - min(4, window - 4 * g) + j % 4] = np.uint32(ids[i, n - window + j])
    _subkeys(prf_key, groups, keys)
    return unmarked


def winners(keys: Words, log_weights: LogWeights) -> npt.NDArray[np.int64]:
    """Winner of one exponential race per row; ties go to the lowest id.

    Guarantee: over uniform keys, id v wins with probability p = exp(log_weights[v]) / sum up to the rounding of race
    times, and with no more than p (1 + 2**-31 (V + 2**14)) + 2**-33 (docs/explanation/tests-and-null-laws.md). Ids with
    less than 2**-37 of the largest probability never win, because race times are no finer than 2**-33.

    Parameters
    ----------
    keys
        uint32, shape (n, 8): one subkey per row.
    log_weights
        float32 or float64, shape (n, V): unnormalised log-probabilities. -inf for an id that must not win.

    Returns
    -------
    int64, shape (n,).

    Raises
    ------
    ValueError
        If a row contains NaN or +inf, or nothing but -inf, or V is 0.

    Notes
    -----
    Differences and times are computed in float64 for the few ids that could win; the keystream is computed for tiles of
    256 ids in which one could.
    """
    log_weights = _checked(log_weights, len(keys))
    out = np.zeros(len(log_weights), dtype=np.int64)
    if _winners(keys, log_weights, out):
        raise unusable_row(log_weights, out)
    return out


def marked_keys(
    ids: npt.NDArray[np.int64], pad: int, window: int, prf_key: Words
) -> tuple[Words, npt.NDArray[np.int64]]:
    """Subkey of each row's context, and the rows that have none: where `gumbel.marked_context` gives none.

    Parameters
    ----------
    ids
        Integers, shape (n, t): token ids; a leading run of `pad` in a row is not part of it.
    pad
        The id that fills rows on the left; -1 for none.
    window
        Context width h, >= 1.
    prf_key
        uint32, shape (8,).

    Returns
    -------
    keys
        uint32, shape (n, 8); of rows that are not marked, no subkey of any context.
    unmarked
        int64, shape (k,), ascending: those rows.
    """
    if ids.dtype != np.int64 or not ids.flags.c_contiguous:
        ids = np.ascontiguousarray(ids, dtype=np.int64)
    keys, marked = np.empty((len(ids), 8), np.uint32), np.empty(len(ids), np.bool_)
    unmarked = _marked_keys(ids, pad, window, prf_key, keys, marked)
    return keys, np.flatnonzero(~marked) if unmarked else _NO_ROWS


@compiled()
def _fill_one_hot(tokens, out):
    for i in range(out.shape[0]):
        out[i, :] = -np.inf
        out[i, tokens[i]] = 0.0


def one_hot(tokens: npt.NDArray[np.int64], log_weights: LogWeights) -> LogWeights:
    """Log-weights of the same shape and type that leave each row its token: 0 there, -inf elsewhere.

    Parameters
    ----------
    tokens
        int64, shape (n,): one id in [0, V) per row.
    log_weights
        float32 or float64, shape (n, V): gives shape and type only.
    """
    out = np.empty(log_weights.shape, log_weights.dtype)
    _fill_one_hot(tokens, out)
    return out


def _checked(log_weights: LogWeights, rows: int) -> LogWeights:
    shape = log_weights.shape
    if len(shape) != 2 or shape[1] == 0 or shape[0] != rows:
        raise ValueError(f"log_weights must have shape (n, V) with V >= 1 and n = {rows} rows, got {shape}.")
    if log_weights.dtype.char not in "fd":
        raise ValueError(f"log_weights must be float32 or float64, got {log_weights.dtype}. Convert them first.")
    return log_weights if log_weights.flags.c_contiguous else log_weights.copy()


def unusable_row(log_weights: LogWeights, out: npt.NDArray[np.int64]) -> ValueError:
    """What is wrong with the first row whose winner is -1."""
    row = int(np.flatnonzero(out == -1)[0])
    peak = log_weights[row].max()
    what = "only -inf: no id is left to draw" if np.isneginf(peak) else f"{peak}"
    return ValueError(f"log_weights must be finite or -inf with a finite largest value; row {row} has {what}.")


def winners_reference(use_key: Words, contexts: Words, log_weights: LogWeights) -> npt.NDArray[np.int64]:
    """As `winners`, from contexts, in plain numpy: the oracle of its tests."""
    times = race_times(expand(use_key, contexts, log_weights.shape[1], backend="numpy"))
    exact = log_weights.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        arrivals = times / np.exp(exact - exact.max(axis=1, keepdims=True))
    first: npt.NDArray[np.int64] = np.argmin(arrivals, axis=1)
    return first
