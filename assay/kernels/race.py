"""The keyed exponential race: X = argmin E_v / p_v, which is Gumbel-max sampling with noise from the PRF.

X ~ p exactly over keys. Reference: Aaronson (2022); Maddison, Tarlow, Minka (2014), arXiv:1411.0030.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.kernels.chacha_numba import LANES, _keystream
from assay.kernels.chacha_numba import subkeys as subkeys
from assay.kernels.prf import expand, race_times

LogWeights = npt.NDArray[np.float32] | npt.NDArray[np.float64]

_TILE = 16 * LANES
_SLOWEST = 16.64  # above every race time: r <= 1 - 2**-24
_LOG2_SMALLEST_R = -33.0
_LOG2_E = np.float32(np.log2(np.e))
# Covers the rounding of the screens in single precision, which is below 2e-5.
_MARGIN = np.float32(1e-3)


@numba.njit(inline="always")
def _log2_weight(row, peak, v):  # type: ignore[no-untyped-def]
    return np.float32(row[v] - peak) * _LOG2_E


@numba.njit(inline="always")
def _log2_below(bits):  # type: ignore[no-untyped-def]
    """A lower bound of log2 of a float in (0, 1): its bits, read as an integer, are linear between powers of two."""
    return np.float32(bits) * np.float32(2.0**-23) - np.float32(127.0)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _race(keys, log_weights, peaks, out):  # type: ignore[no-untyped-def]
    rows, vocabulary = log_weights.shape
    tile = np.empty((LANES, 16), np.uint32)
    words = tile.reshape(_TILE)
    r = np.empty(_TILE, np.float32)
    bits = r.view(np.int32)
    top = np.float32(1.0) - np.float32(2.0**-24)
    for i in range(rows):
        row = log_weights[i]
        peak = peaks[i]
        best = _SLOWEST
        for start in range(0, vocabulary, _TILE):
            count = min(_TILE, vocabulary - start)
            log2_best = np.float32(np.log2(best)) + _MARGIN
            # Where even the smallest r would lose, the keystream is not needed: nearly everywhere after top-k or top-p.
            passed = 0
            for j in range(count):
                passed += np.float32(_LOG2_SMALLEST_R) < log2_best + _log2_weight(row, peak, start + j)
            if passed == 0:
                continue
            _keystream(keys[i], np.uint32(start // 16), np.uint32(0), np.uint32(0), tile)
            for j in range(_TILE):
                r[j] = min((np.float32(words[j]) + np.float32(0.5)) * np.float32(2.0**-32), top)
            # E = -log1p(-r) >= r, so v can win only if log2(r) < log2(best * weight). Few pass this screen, and only
            # they are given an exact logarithm and exponential.
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
                        out[i] = start + j


def winners(keys: Words, log_weights: LogWeights) -> npt.NDArray[np.int64]:
    """Winner of one exponential race per row; ties go to the lowest id.

    Guarantee: over uniform keys, id v wins with probability exp(log_weights[v]) / sum, up to 2**-32 per id: ids with
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
    if log_weights.ndim != 2 or log_weights.shape[1] == 0 or len(keys) != len(log_weights):
        raise ValueError(
            f"log_weights must have shape (n, V) with V >= 1 and one row per key, got {log_weights.shape} "
            f"for {len(keys)} keys."
        )
    if log_weights.dtype not in (np.float32, np.float64):
        raise ValueError(f"log_weights must be float32 or float64, got {log_weights.dtype}. Convert them first.")
    peaks = log_weights.max(axis=1)  # NaN if the row has one
    if not np.isfinite(peaks).all():
        row = int(np.flatnonzero(~np.isfinite(peaks))[0])
        what = "only -inf: no id is left to draw" if np.isneginf(peaks[row]) else f"{peaks[row]}"
        raise ValueError(f"log_weights must be finite or -inf with a finite largest value; row {row} has {what}.")
    out = np.empty(len(log_weights), dtype=np.int64)
    _race(keys, np.ascontiguousarray(log_weights), peaks, out)
    return out


def winners_reference(use_key: Words, contexts: Words, log_weights: LogWeights) -> npt.NDArray[np.int64]:
    """As `winners`, from contexts, in plain numpy: the oracle of its tests."""
    times = race_times(expand(use_key, contexts, log_weights.shape[1], backend="numpy"))
    exact = log_weights.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        arrivals = times / np.exp(exact - exact.max(axis=1, keepdims=True))
    first: npt.NDArray[np.int64] = np.argmin(arrivals, axis=1)
    return first
