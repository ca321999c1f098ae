"""One pass over a block of logits: what each row's statistics need, in float32 lanes and float64 totals.

A block is summed with weights e = exp(l - m), m the largest logit so far, around the mean so far; the totals of the
blocks are then merged as central moments, so that nothing cancels.
Reference: Milakov and Gimelshein (2018), arXiv:1805.02867 (running maximum); Pebay (2008), SAND2008-6212 (merging).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import overload

from assay._compiled import compiled
from assay.kernels.scoring.running import CROSS, MASS, MAXIMUM, MEAN, SECOND, THIRD, TILTED, RunningSums

_STEP = 2048  # logits summed in float32 before they go to the float64 totals: 8 KiB, in the first-level cache
_LOWEST = np.float32(-87.0)  # exp of it is 1.6e-38, the edge of normal float32
_KEY_OF_MINUS_INF = np.int32(-2139095041)
_LOG2E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _exp(x):
    """Exp of a float32 in [-87, 0] to about one unit in the last place (Cephes expf); NaN stays NaN."""
    n = np.floor(x * _LOG2E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


def _widened(row: Any, scratch: Any) -> Any:
    """The row as float32: itself, or the bits of bfloat16 (uint16) widened into `scratch`."""


@overload(_widened)
def _widened_by_type(row, scratch):
    if row.dtype == numba.float32:
        return lambda row, scratch: row

    def widen(row, scratch):
        bits = scratch.view(np.uint32)
        for j in range(row.shape[0]):
            bits[j] = np.uint32(row[j]) << np.uint32(16)
        return scratch[: row.shape[0]]

    return widen


@numba.njit(error_model="numpy")
def _maximum(row):
    """Largest entry; NaN if there is one, so that it shows even among nothing but -inf."""
    best, least = np.int32(-2147483648), np.int32(2147483647)
    for j in range(row.shape[0]):
        bits = np.float32(row[j]).view(np.int32)
        # The bits sorted as integers: integer maxima vectorise without the assumption that no NaN occurs. A NaN lies
        # above inf, or, with its sign bit set as processors make it, below -inf.
        key = np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        best = key if key > best else best
        least = key if key < least else least
    if least < _KEY_OF_MINUS_INF:
        return np.float32(np.nan)
    return np.int32(best ^ np.int32((best >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _sums(row, top, centre, chosen):
    """Sums of e u^k with u = l - centre, counts against `chosen`, and sums of e^(1 - s) at the default tilts s."""
    shift = top - centre
    first = second = third = np.float32(0)
    p4 = p6 = p7 = p8 = p9 = p10 = p12 = p16 = np.float32(0)
    # Counts in float32, exact below 2^24: an integer would widen to 64 bits and halve the lanes.
    greater = equal = np.float32(0)
    for j in range(row.shape[0]):
        x = row[j]
        greater += np.float32(1) if x > chosen else np.float32(0)
        equal += np.float32(1) if x == chosen else np.float32(0)
        d = x - top
        d = np.float32(8) * _LOWEST if d < np.float32(8) * _LOWEST else d
        # An eighth of the exponent: its powers are the tilted terms, at one product each.
        q = _exp(np.float32(0.125) * d)
        q2 = q * q
        q4 = q2 * q2
        e = q4 * q4
        u = d + shift
        eu = e * u
        euu = eu * u
        first += eu
        second += euu
        third += euu * u
        p4 += q4
        p6 += q4 * q2
        p7 += q4 * q2 * q
        p8 += e
        p9 += e * q
        p10 += e * q2
        p12 += e * q4
        p16 += e * e
    return greater, equal, p8, first, second, third, (p16, p12, p10, p9, p7, p6, p4)


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _tilted(row, top, power):
    total = np.float32(0)
    for j in range(row.shape[0]):
        d = power * (row[j] - top)
        d = _LOWEST if d < _LOWEST else d
        total += _exp(d)
    return total


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _crossed(row, other, top, centre):
    """Sum of e times the second model's logit, where e is not 0."""
    total = np.float32(0)
    for j in range(row.shape[0]):
        d = row[j] - top
        e = _exp(_LOWEST if d < _LOWEST else d)
        total += np.float32(0) if d < _LOWEST else e * (other[j] - centre)
    return total


@numba.njit(error_model="numpy")
def _merge(state, mass, mean, second, third):
    """Add a group of given mass, mean and central sums of order two and three to the totals."""
    total = state[MASS] + mass
    delta = mean - state[MEAN] if state[MASS] > 0 else 0.0
    share = state[MASS] * mass / total
    state[THIRD] += (
        third
        + delta**3 * share * (state[MASS] - mass) / total
        + 3.0 * delta * (state[MASS] * second - mass * state[SECOND]) / total
    )
    state[SECOND] += second + delta * delta * share
    state[MEAN] = state[MEAN] + delta * mass / total if state[MASS] > 0 else mean
    state[MASS] = total


@numba.njit(error_model="numpy")
def _rescale(state, powers, top):
    """Express the totals in terms of a larger maximum."""
    fall = state[MAXIMUM] - top
    scale = np.exp(fall)
    state[MASS] *= scale
    state[SECOND] *= scale
    state[THIRD] *= scale
    # Where the old mass vanishes so does its cross term, were it infinite.
    state[CROSS] = state[CROSS] * scale if scale > 0 else 0.0
    for k in range(len(powers)):
        state[TILTED + k] *= np.exp(powers[k] * fall)
    state[MAXIMUM] = top


@numba.njit(error_model="numpy")
def _add_other(beside, row, highest, state, others):
    """Add a block of the second model: its own running maximum and mass, and the cross term around a fixed centre."""
    peak = _maximum(beside)
    if peak > -np.inf or peak != peak:
        if others[0] == -np.inf:
            others[2] = peak
        top = max(np.float32(others[0]), peak)
        others[1] = others[1] * np.exp(others[0] - top) + _tilted(beside, top, np.float32(1))
        others[0] = top
    if highest > -np.inf:
        state[CROSS] += _crossed(row, beside, np.float32(state[MAXIMUM]), np.float32(others[2]))


@compiled(error_model="numpy")
def _update(logits, start, stop, offset, chosen, targets, powers, fast, state, greater, ties, seen, other, others):
    """Add columns [start, stop) of `logits`, candidates offset, offset + 1, ..., to the totals of every row."""
    scratch = np.empty(_STEP, np.float32)
    for i in range(logits.shape[0]):
        place = targets[i] - offset
        for a in range(start, stop, _STEP):
            row = _widened(logits[i, a : min(a + _STEP, stop)], scratch)
            if 0 <= place - (a - start) < len(row):
                seen[i] = row[place - (a - start)]
            highest = _maximum(row)
            if highest == -np.inf:
                ties[i] += len(row) if chosen[i] == -np.inf else 0
            else:
                old = state[i, MAXIMUM]
                top = max(np.float32(old), highest)
                if top > old:
                    _rescale(state[i], powers, np.float64(top))
                centre = np.float32(state[i, MEAN])
                if highest > old + 2.0:
                    # The mean so far says nothing about a block that outweighs all before it: sum once to find it.
                    _, _, mass, first, _, _, _ = _sums(row, top, top, chosen[i])
                    centre = np.float32(top + first / mass)
                above, same, mass, first, second, third, tilted = _sums(row, top, centre, chosen[i])
                greater[i] += np.int64(above)
                ties[i] += np.int64(same)
                if mass != 0:  # NaN passes, and shows in the result
                    w, m1 = np.float64(mass), np.float64(first) / np.float64(mass)
                    m2, m3 = np.float64(second), np.float64(third)
                    central = m3 - 3.0 * m1 * m2 + 2.0 * w * m1 * m1 * m1
                    _merge(state[i], w, np.float64(centre) + m1, m2 - w * m1 * m1, central)
                for k in range(len(powers)):
                    power = np.float32(powers[k])
                    state[i, TILTED + k] += np.float64(tilted[k]) if fast else np.float64(_tilted(row, top, power))
            if other.shape[0]:
                _add_other(other[i, a : min(a + _STEP, stop)], row, highest, state[i], others[i])


def update(
    sums: RunningSums,
    rows: slice,
    logits: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    columns: slice,
    offset: int,
    other: npt.NDArray[np.float32] | None = None,
    threads: int = 1,
) -> None:
    """Add a block of logits to the running sums of `rows`, in place.

    Parameters
    ----------
    logits
        float32, or uint16 for the bits of bfloat16, C-contiguous, shape (n, c) with n the number of `rows`.
    columns
        Which columns of `logits` to add; the first of them is candidate `offset`.
    other
        float32, same shape, C-contiguous: the second model's logits.
    threads
        Rows are shared among this many threads; the result does not depend on it.
    """
    beside = np.empty((0, 0), dtype=np.float32) if other is None else other
    first, n = rows.start, rows.stop - rows.start

    def add(part: slice) -> None:
        whole = slice(first + part.start, first + part.stop)
        _update(
            logits[part],
            columns.start,
            columns.stop,
            offset,
            sums.chosen[whole],
            sums.targets[whole],
            sums.powers,
            sums.default_tilts,
            sums.state[whole],
            sums.greater[whole],
            sums.ties[whole],
            sums.seen[whole],
            beside[part],
            sums.others[whole],
        )

    if threads == 1 or n * (columns.stop - columns.start) < 1 << 18:
        add(slice(0, n))
        return
    step = -(-n // threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(add, [slice(a, min(a + step, n)) for a in range(0, n, step)]))
