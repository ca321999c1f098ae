"""How a second key tilts the law of the next token: green lists, tournament, permutation reweighting; compiled.

Words are computed for tiles of 256 ids in which a candidate lies, so that top-k and top-p make a step cheap.
"""

from __future__ import annotations

import math

import numpy as np

from assay._compiled import compiled
from assay.kernels.chacha_numba import LANES, _keystream

# Ids below 2**-64 of the largest probability are left out: no race can see them, even where a tilt doubles them thirty
# times over, since race times are no finer than 2**-33.
_FLOOR = -64.0 * math.log(2.0)
TILE = 16 * LANES
BUCKETS = 4096  # pieces of the order of the words, by their highest twelve bits


@compiled()
def candidates(row, peak, index, weight):
    """Ids that can be drawn and their weights relative to the largest; returns how many."""
    count = 0
    for v in range(row.shape[0]):
        below = np.float64(row[v]) - np.float64(peak)
        if below >= _FLOOR:
            index[count] = v
            weight[count] = np.exp(below)
            count += 1
    return count


@compiled()
def words_of(key, stream, index, count, out):
    """PRF words of the first `count` ids of `index`, which ascends."""
    tile = np.empty((LANES, 16), np.uint32)
    flat = tile.reshape(TILE)
    current = -1
    for i in range(count):
        number = index[i] // TILE
        if number != current:
            _keystream(key, np.uint32(number * LANES), stream, np.uint32(0), tile)
            current = number
        out[i] = flat[index[i] - number * TILE]


@compiled()
def members(keys, anchors, member_stream, anchor_stream, threshold, index, count, out):
    """Membership of each candidate; with several keys, under the one whose anchor word is smallest."""
    words = np.empty(count, np.uint32)
    if keys.shape[0] == 1:
        words_of(keys[0], member_stream, index, count, words)
        for i in range(count):
            out[i] = words[i] < threshold
        return
    chosen = np.zeros(count, np.int64)
    least = np.empty(count, np.uint64)
    least[:] = np.uint64(0xFFFFFFFFFFFFFFFF)
    for j in range(keys.shape[0]):
        words_of(keys[j], anchor_stream, index, count, words)
        for i in range(count):
            # The id in the low half settles a tie between words.
            rank = (np.uint64(words[i]) << np.uint64(32)) | np.uint64(anchors[j])
            if rank < least[i]:
                least[i] = rank
                chosen[i] = j
    for j in range(keys.shape[0]):
        words_of(keys[j], member_stream, index, count, words)
        for i in range(count):
            if chosen[i] == j:
                out[i] = words[i] < threshold


# Sums may be reordered, so that they run in vector registers; words and tokens of other rows do not depend on it.
@compiled(fastmath={"reassoc", "nsz"})
def tournament_law(words, weight, count, layers):
    """p <- p (1 + g - sum g p), layer by layer, in place, from the bits of the words; `weight` must sum to 1."""
    green = 0.0
    for j in range(count):
        green += weight[j] * np.float64(words[j] & np.uint32(1))
    for layer in range(layers):
        shift = np.uint32(layer)
        following = np.uint32(min(layer + 1, 31))
        base = 1.0 - green
        green = 0.0
        for j in range(count):
            p = weight[j] * (base + np.float64((words[j] >> shift) & np.uint32(1)))
            weight[j] = p
            green += p * np.float64((words[j] >> following) & np.uint32(1))


@compiled()
def _bound(words, index, weight, count, masses, cut):
    """The candidate on which the cumulated mass in the order of (word, id) passes `cut`, and its share above it."""
    below = 0.0
    bucket = 0
    while bucket < BUCKETS - 1 and below + masses[bucket] <= cut:
        below += masses[bucket]
        bucket += 1
    inside = np.empty(count, np.uint64)
    size = 0
    for j in range(count):
        if words[j] >> np.uint32(20) == bucket:
            inside[size] = (np.uint64(words[j]) << np.uint64(32)) | np.uint64(j)
            size += 1
    order = np.sort(inside[:size])
    for rank in order:
        mass = weight[np.int64(rank & np.uint64(0xFFFFFFFF))]
        if below + mass > cut:
            return rank, (below + mass - cut) / mass
        below += mass
    # Rounding left the cut just above this bucket: everything up to here lies below it.
    return ((np.uint64(bucket + 1) << np.uint64(52)) - np.uint64(1)), 0.0


@compiled()
def reweight_law(words, index, weight, count, alpha):
    """Mass in the order of (word, id) counts 0 below alpha, 1 up to 1 - alpha, 2 above; in place; sum must be 1."""
    masses = np.zeros(BUCKETS, np.float64)
    for j in range(count):
        masses[words[j] >> np.uint32(20)] += weight[j]
    first, first_share = _bound(words, index, weight, count, masses, alpha)
    second, second_share = _bound(words, index, weight, count, masses, 1.0 - alpha)
    for j in range(count):
        rank = (np.uint64(words[j]) << np.uint64(32)) | np.uint64(j)
        factor = 1.0 if rank > first else (first_share if rank == first else 0.0)
        factor += 1.0 if rank > second else (second_share if rank == second else 0.0)
        weight[j] *= factor
