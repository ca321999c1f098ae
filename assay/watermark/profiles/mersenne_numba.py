"""Green lists of PyTorch's CPU generator, compiled: MT19937, then a forward Fisher-Yates shuffle cut short.

`torch.randperm(V)` swaps place i with place i + (r_i mod (V - i)) for raw 32-bit draws r_i; the first k places are the
list, so k swaps are enough. Reference: Matsumoto and Nishimura (1998), doi:10.1145/272991.272995.
"""

from __future__ import annotations

import numba
import numpy as np

from assay._compiled import compiled

_N = 624
_M = 397
EMPTY = -1


@numba.njit(inline="always")
def _seed(state, seed):
    state[0] = seed
    for i in range(1, _N):
        previous = state[i - 1]
        state[i] = np.uint32(np.uint32(1812433253) * (previous ^ (previous >> np.uint32(30))) + np.uint32(i))


@numba.njit(inline="always")
def _twist(upper, lower):
    mixed = (upper & np.uint32(0x80000000)) | (lower & np.uint32(0x7FFFFFFF))
    return (mixed >> np.uint32(1)) ^ (np.uint32(0x9908B0DF) if mixed & np.uint32(1) else np.uint32(0))


@numba.njit(inline="always")
def _refill(state):
    for i in range(_N - _M):
        state[i] = state[i + _M] ^ _twist(state[i], state[i + 1])
    for i in range(_N - _M, _N - 1):
        state[i] = state[i + _M - _N] ^ _twist(state[i], state[i + 1])
    state[_N - 1] = state[_M - 1] ^ _twist(state[_N - 1], state[0])


@numba.njit(inline="always")
def _temper(word):
    word ^= word >> np.uint32(11)
    word ^= (word << np.uint32(7)) & np.uint32(0x9D2C5680)
    word ^= (word << np.uint32(15)) & np.uint32(0xEFC60000)
    return word ^ (word >> np.uint32(18))


@compiled()
def draws(seed, out):
    """Successive raw 32-bit draws."""
    state = np.empty(_N, np.uint32)
    _seed(state, seed)
    for i in range(out.shape[0]):
        if i % _N == 0:
            _refill(state)
        out[i] = _temper(state[i % _N])


@compiled()
def shuffle(seed, order, places, chosen):
    """The first len(chosen) entries of the shuffle of `order`, which is 0, 1, 2, ... before and after the call.

    `places` is scratch of the length of `chosen`.
    """
    size, count = order.shape[0], chosen.shape[0]
    state = np.empty(_N, np.uint32)
    _seed(state, seed)
    for i in range(count):
        if i % _N == 0:
            _refill(state)
        # The last place of a whole shuffle has nothing left to swap with; no draw is made for it.
        step = np.int64(_temper(state[i % _N])) % (size - i) if i < size - 1 else 0
        places[i] = i + step
        order[i], order[i + step] = order[i + step], order[i]
        chosen[i] = order[i]
    # Swapped back in reverse: cheaper than writing 0, 1, 2, ... again.
    for i in range(count - 1, -1, -1):
        order[i], order[places[i]] = order[places[i]], order[i]


@compiled()
def fill_rows(seeds, size, count, rows):
    """One packed bit row per seed: bit v is set where v is in the seed's list of `count` of `size` ids."""
    order = np.arange(size).astype(np.int32)
    places = np.empty(count, np.int32)
    chosen = np.empty(count, np.int32)
    for i in range(seeds.shape[0]):
        shuffle(seeds[i], order, places, chosen)
        rows[i, :] = 0
        for v in chosen:
            rows[i, v >> 3] |= np.uint8(1 << (v & 7))


@numba.njit(inline="always")
def _slot(table_seeds, table_rows, seed):
    mask = table_rows.shape[0] - 1
    slot = np.int64((np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) & mask
    while table_rows[slot] != EMPTY and table_seeds[slot] != seed:
        slot = (slot + 1) & mask
    return slot


@compiled()
def look_up(seeds, targets, rows, table_seeds, table_rows, used, limit, added, out):
    """Bits of (seed, target) pairs from cached rows; seeds without a row get the next free one and are put in `added`.

    Returns (how many pairs were reached before more than `limit` rows were needed, how many seeds were added). Pairs
    whose seed was added now have no bit yet: look them up again once the rows are filled.
    """
    count = 0
    for i in range(seeds.shape[0]):
        slot = _slot(table_seeds, table_rows, seeds[i])
        if table_rows[slot] == EMPTY:
            if used + count == limit:
                return i, count
            table_seeds[slot] = seeds[i]
            table_rows[slot] = used + count
            added[count] = seeds[i]
            count += 1
        elif table_rows[slot] < used:
            out[i] = (rows[table_rows[slot], targets[i] >> 3] >> np.uint8(targets[i] & 7)) & np.uint8(1)
    return seeds.shape[0], count


@compiled()
def smallest_products(table, ids, width, key, out):
    """The min-hash seed of the `width` ids that end at each place: min over them of key * T[x] * T[last], wrapping."""
    for i in range(width - 1, ids.shape[0]):
        last = key * (np.int64(table[ids[i] % table.shape[0]]) + 1)
        least = np.int64(0x7FFFFFFFFFFFFFFF)
        for j in range(i - width + 1, i + 1):
            least = min(least, (np.int64(table[ids[j] % table.shape[0]]) + 1) * last)
        out[i] = least


@compiled()
def first_pairs(seeds, targets, eligible, offsets, out):
    """Which eligible places show a (seed, target) pair for the first time in their document."""
    longest = 0
    for d in range(offsets.shape[0] - 1):
        longest = max(longest, offsets[d + 1] - offsets[d])
    size = 16
    while size < 2 * longest:
        size *= 2
    slots = np.full(size, -1, np.int64)
    mask = size - 1
    for d in range(offsets.shape[0] - 1):
        for i in range(offsets[d], offsets[d + 1]):
            if not eligible[i]:
                continue
            pair = (np.uint64(seeds[i]) << np.uint64(32)) | np.uint64(targets[i])
            slot = np.int64((pair * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)) & mask
            while slots[slot] >= offsets[d] and (seeds[slots[slot]] != seeds[i] or targets[slots[slot]] != targets[i]):
                slot = (slot + 1) & mask
            if slots[slot] < offsets[d]:
                slots[slot] = i
                out[i] = True


@compiled()
def own_members(seeds, targets, size, count, out):
    """Whether each target is in the list of its own seed, without the list: the shuffle is followed for one id."""
    state = np.empty(_N, np.uint32)
    for t in range(seeds.shape[0]):
        _seed(state, seeds[t])
        place = np.int64(targets[t])
        out[t] = False
        for i in range(count):
            if i % _N == 0:
                _refill(state)
            other = np.int64(i)
            if i < size - 1:
                other += np.int64(_temper(state[i % _N]) % np.uint32(size - i))
            if other == place:
                out[t] = True
                break
            if i == place:
                place = other
