"""The hashes of deployed schemes, compiled: linear congruential (SynthID), Philox4x32-10 (vLLM), Murmur (SGLang).

Bit-exact with the published definitions; the vectors are in tests/watermark/test_deployed_vectors.py.
Reference: Salmon et al. (2011), doi:10.1145/2063384.2063405 (Philox); Appleby (2011), MurmurHash3.
"""

from __future__ import annotations

import numba
import numpy as np

from assay._compiled import compiled

_LCG = np.uint64(6364136223846793005)
_LOW = np.uint64(0xFFFFFFFF)


@numba.njit(inline="always")
def _fold(state, value):
    """One step of SynthID's hash, modulo 2**64."""
    return (state + value) * _LCG + np.uint64(1)


@compiled()
def fold_grams(ids, start, width, first, out):
    """Hashes of the `width` ids that end at each place of `ids` from `start` on; `first` is the initial value."""
    for i in range(start, ids.shape[0]):
        state = first
        for j in range(i - width + 1, i + 1):
            state = _fold(state, np.uint64(ids[j]))
        out[i] = state


@compiled()
def layer_bits(states, keys, out):
    """Bits of synthid-text: each layer folds its key into the state, then 12 rounds of hash and arithmetic shift."""
    for i in range(states.shape[0]):
        bits = np.uint64(0)
        for layer in range(keys.shape[0]):
            value = np.int64(_fold(states[i], keys[layer]))
            for _ in range(12):
                value = np.int64(_fold(np.uint64(value), np.uint64(1))) >> np.int64(5)
            bits |= ((np.uint64(value) >> np.uint64(30)) & np.uint64(1)) << np.uint64(layer)
        out[i] = bits


@compiled()
def tournament(p, bits, depth, leaves):
    """The law after the tournament, in place; see `_tournament.tournament_law`."""
    p /= p.sum()
    for layer in range(depth):
        shift = np.uint64(layer)
        mass = 0.0
        for i in range(p.shape[0]):
            mass += p[i] if (bits[i] >> shift) & np.uint64(1) else 0.0
        mass = min(mass, 1.0)  # rounding may have passed it
        if mass == 0.0:
            continue
        won, lost = 2.0 - mass, 1.0 - mass
        if leaves > 2:
            won, lost = (1.0 - (1.0 - mass) ** leaves) / mass, (1.0 - mass) ** (leaves - 1)
        for i in range(p.shape[0]):
            p[i] *= won if (bits[i] >> shift) & np.uint64(1) else lost


@compiled()
def recent(states, offsets, history, out):
    """Whether each state differs from the `history` - 1 or fewer before it that the rule keeps, and from 0.

    The rule's memory begins filled with zeros, drops the oldest entry as it takes a new one, and takes repeats as well.
    """
    longest = 0
    for d in range(offsets.shape[0] - 1):
        longest = max(longest, offsets[d + 1] - offsets[d])
    size = 16
    while size < 2 * longest:
        size *= 2
    slots = np.full(size, -1, np.int64)  # last place of each distinct state
    mask = np.uint64(size - 1)
    for d in range(offsets.shape[0] - 1):
        for i in range(offsets[d], offsets[d + 1]):
            slot = np.int64((states[i] * _LCG >> np.uint64(32)) & mask)
            # A place before this document is an empty slot: no clearing between documents.
            while slots[slot] >= offsets[d] and states[slots[slot]] != states[i]:
                slot = (slot + 1) & np.int64(mask)
            before = slots[slot]
            zero_left = states[i] == np.uint64(0) and i - offsets[d] < history
            out[i] = not (zero_left or (before >= offsets[d] and i - before <= history))
            slots[slot] = i


@numba.njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * np.uint64(c0)
        p1 = np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0,
            np.uint32(p1 & _LOW),
            np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1,
            np.uint32(p0 & _LOW),
        )
        k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
        k1 = np.uint32(k1 + np.uint32(0xBB67AE85))
    return c0, c1, c2, c3


@numba.njit(inline="always")
def _philox_context(context, k0, k1):
    width = context.shape[0]
    s0, s1, s2, s3 = np.uint32(0x574D4358), np.uint32(width), np.uint32(0), np.uint32(0)
    block = np.empty(4, np.uint32)
    for offset in range(0, width, 4):
        for j in range(4):
            block[j] = context[offset + j] if offset + j < width else np.uint32(0xFFFFFFFF) - np.uint32(j)
        s0, s1, s2, s3 = _philox(s0 ^ block[0], s1 ^ block[1], s2 ^ block[2], s3 ^ block[3], k0 ^ np.uint32(offset), k1)
    return s0, s1, s2, s3


@compiled()
def philox_at(contexts, tokens, k0, k1, out):
    """One word per (context, token)."""
    for i in range(contexts.shape[0]):
        s0, s1, s2, s3 = _philox_context(contexts[i], k0, k1)
        words = _philox(tokens[i] >> np.uint32(2), s0, s1, s2, k0 ^ s3, k1 ^ np.uint32(0x574D544B))
        lane = tokens[i] & np.uint32(3)
        out[i] = words[0] if lane == 0 else (words[1] if lane == 1 else (words[2] if lane == 2 else words[3]))


@compiled()
def philox_row(context, k0, k1, out):
    """The words of every token id below the length of `out` after one context."""
    s0, s1, s2, s3 = _philox_context(context, k0, k1)
    for block in range((out.shape[0] + 3) // 4):
        words = _philox(np.uint32(block), s0, s1, s2, k0 ^ s3, k1 ^ np.uint32(0x574D544B))
        for lane in range(min(4, out.shape[0] - 4 * block)):
            out[4 * block + lane] = (
                words[0] if lane == 0 else (words[1] if lane == 1 else (words[2] if lane == 2 else words[3]))
            )


@numba.njit(inline="always")
def _rotate(value, shift):
    return (value << np.uint32(shift)) | (value >> np.uint32(32 - shift))


@numba.njit(inline="always")
def _murmur(state, value):
    value = _rotate(np.uint32(value * np.uint32(0xCC9E2D51)), 15)
    state = _rotate(state ^ np.uint32(value * np.uint32(0x1B873593)), 13)
    return np.uint32(state * np.uint32(5) + np.uint32(0xE6546B64))


@numba.njit(inline="always")
def _finish(state):
    state = np.uint32((state ^ (state >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    state = np.uint32((state ^ (state >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return state ^ (state >> np.uint32(16))


@compiled()
def murmur_grams(ids, offsets, window, out):
    """Hashes of the up to `window` ids before each place of its document."""
    for d in range(offsets.shape[0] - 1):
        for i in range(offsets[d], offsets[d + 1]):
            first = max(offsets[d], i - window)
            state = np.uint32(0)
            for j in range(first, i):
                state = _murmur(state, ids[j])
            out[i] = _finish(state ^ np.uint32(4 * (i - first)))


@compiled()
def murmur_words(key, contexts, tokens, out):
    """One word per (context hash, token), after the two words of `key`; with four of them and no token, a coin."""
    start = np.uint32(0)
    for word in key:
        start = _murmur(start, word)
    length = np.uint32(4 * (key.shape[0] + 2))
    for i in range(contexts.shape[0]):
        out[i] = _finish(_murmur(_murmur(start, contexts[i]), tokens[i]) ^ length)


@compiled()
def murmur_coins(key, contexts, out):
    """One word per context hash, after the four words of both keys."""
    start = np.uint32(0)
    for word in key:
        start = _murmur(start, word)
    for i in range(contexts.shape[0]):
        out[i] = _finish(_murmur(start, contexts[i]) ^ np.uint32(4 * (key.shape[0] + 1)))
