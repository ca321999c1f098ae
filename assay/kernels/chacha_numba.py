"""ChaCha20 PRF in numba, bit-equal to `chacha`: 16 rows or blocks side by side so that the rounds vectorise.

Reference: RFC 8439, section 2.3; draft-irtf-cfrg-xchacha-03, section 2.2.
"""

from __future__ import annotations

import numba
import numpy as np

from assay.kernels.chacha import Words, context_groups

LANES = 16


@numba.njit(inline="always")
def _quarter(x, a, b, c, d):  # type: ignore[no-untyped-def]
    for j in range(LANES):
        x[a, j] += x[b, j]
        t = x[d, j] ^ x[a, j]
        x[d, j] = (t << np.uint32(16)) | (t >> np.uint32(16))
        x[c, j] += x[d, j]
        t = x[b, j] ^ x[c, j]
        x[b, j] = (t << np.uint32(12)) | (t >> np.uint32(20))
        x[a, j] += x[b, j]
        t = x[d, j] ^ x[a, j]
        x[d, j] = (t << np.uint32(8)) | (t >> np.uint32(24))
        x[c, j] += x[d, j]
        t = x[b, j] ^ x[c, j]
        x[b, j] = (t << np.uint32(7)) | (t >> np.uint32(25))


@numba.njit(cache=True)
def _rounds(x):  # type: ignore[no-untyped-def]
    for _ in range(10):
        _quarter(x, 0, 4, 8, 12)
        _quarter(x, 1, 5, 9, 13)
        _quarter(x, 2, 6, 10, 14)
        _quarter(x, 3, 7, 11, 15)
        _quarter(x, 0, 5, 10, 15)
        _quarter(x, 1, 6, 11, 12)
        _quarter(x, 2, 7, 8, 13)
        _quarter(x, 3, 4, 9, 14)


@numba.njit(inline="always")
def _constants(x):  # type: ignore[no-untyped-def]
    for j in range(LANES):
        x[0, j] = np.uint32(0x61707865)
        x[1, j] = np.uint32(0x3320646E)
        x[2, j] = np.uint32(0x79622D32)
        x[3, j] = np.uint32(0x6B206574)


@numba.njit(cache=True, nogil=True)
def _subkeys(use_key, groups, out):  # type: ignore[no-untyped-def]
    n, depth, _ = groups.shape
    x = np.empty((16, LANES), np.uint32)
    for start in range(0, n, LANES):
        width = min(LANES, n - start)
        for g in range(depth):
            if g == 0:
                for i in range(8):
                    for j in range(LANES):
                        x[4 + i, j] = use_key[i]
            else:
                for i in range(4):
                    for j in range(LANES):
                        x[4 + i, j] = x[i, j]
                        x[8 + i, j] = x[12 + i, j]
            _constants(x)
            for j in range(LANES):
                row = start + min(j, width - 1)
                for i in range(4):
                    x[12 + i, j] = groups[row, g, i]
            _rounds(x)
        for j in range(width):
            for i in range(4):
                out[start + j, i] = x[i, j]
                out[start + j, 4 + i] = x[12 + i, j]


@numba.njit(cache=True, nogil=True)
def _words_at(keys, candidates, stream, aux, out):  # type: ignore[no-untyped-def]
    n = candidates.shape[0]
    x = np.empty((16, LANES), np.uint32)
    for start in range(0, n, LANES):
        width = min(LANES, n - start)
        _constants(x)
        for j in range(LANES):
            row = start + min(j, width - 1)
            for i in range(8):
                x[4 + i, j] = keys[row, i]
            x[12, j] = candidates[row] >> np.uint32(4)
            x[13, j] = np.uint32(0)
            x[14, j] = stream
            x[15, j] = aux
        _rounds(x)
        for j in range(width):
            row = start + j
            word = candidates[row] & np.uint32(15)
            if word < 4:
                first = np.uint32(0x61707865)
                if word == 1:
                    first = np.uint32(0x3320646E)
                elif word == 2:
                    first = np.uint32(0x79622D32)
                elif word == 3:
                    first = np.uint32(0x6B206574)
            elif word < 12:
                first = keys[row, word - 4]
            elif word == 12:
                first = candidates[row] >> np.uint32(4)
            elif word == 13:
                first = np.uint32(0)
            elif word == 14:
                first = stream
            else:
                first = aux
            out[row] = x[word, j] + first


@numba.njit(cache=True, nogil=True)
def _keystream(key, first_block, blocks, stream, aux, out):  # type: ignore[no-untyped-def]
    """Blocks first_block .. first_block + blocks - 1 of one key into out (16 words per block), blocks <= LANES."""
    x = np.empty((16, LANES), np.uint32)
    _constants(x)
    for i in range(8):
        for j in range(LANES):
            x[4 + i, j] = key[i]
    for j in range(LANES):
        x[12, j] = np.uint32(first_block + j)
        x[13, j] = np.uint32(0)
        x[14, j] = stream
        x[15, j] = aux
    _rounds(x)
    for j in range(blocks):
        base = 16 * j
        out[base + 0] = x[0, j] + np.uint32(0x61707865)
        out[base + 1] = x[1, j] + np.uint32(0x3320646E)
        out[base + 2] = x[2, j] + np.uint32(0x79622D32)
        out[base + 3] = x[3, j] + np.uint32(0x6B206574)
        for i in range(8):
            out[base + 4 + i] = x[4 + i, j] + key[i]
        out[base + 12] = x[12, j] + np.uint32(first_block + j)
        out[base + 13] = x[13, j]
        out[base + 14] = x[14, j] + stream
        out[base + 15] = x[15, j] + aux


@numba.njit(cache=True, nogil=True)
def _expand(keys, vocabulary, stream, aux, out):  # type: ignore[no-untyped-def]
    buffer = np.empty(16 * LANES, np.uint32)
    for row in range(keys.shape[0]):
        for start in range(0, vocabulary, 16 * LANES):
            count = min(16 * LANES, vocabulary - start)
            _keystream(keys[row], start // 16, (count + 15) // 16, stream, aux, buffer)
            out[row, start : start + count] = buffer[:count]


def subkeys(use_key: Words, contexts: Words) -> Words:
    """As `chacha.subkeys`."""
    out = np.empty((len(contexts), 8), dtype=np.uint32)
    _subkeys(use_key, context_groups(contexts), out)
    return out


def words_at(use_key: Words, contexts: Words, candidates: Words, stream: int = 0, aux: int = 0) -> Words:
    """As `chacha.words_at`."""
    out = np.empty(len(candidates), dtype=np.uint32)
    _words_at(subkeys(use_key, contexts), candidates, np.uint32(stream), np.uint32(aux), out)
    return out


def expand(use_key: Words, contexts: Words, vocabulary: int, stream: int = 0, aux: int = 0) -> Words:
    """As `chacha.expand`."""
    out = np.empty((len(contexts), vocabulary), dtype=np.uint32)
    _expand(subkeys(use_key, contexts), vocabulary, np.uint32(stream), np.uint32(aux), out)
    return out
