"""ChaCha20 PRF in numba, bit-equal to `chacha`: 16 rows or blocks side by side, one vector register per state word.

Reference: RFC 8439, section 2.3; draft-irtf-cfrg-xchacha-03, section 2.2.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba.core import cgutils, types
from numba.extending import intrinsic

from assay._compiled import compiled
from assay.kernels.chacha import _COLUMNS_THEN_DIAGONALS, PAD, Words, context_groups

LANES = 16
_WORD = ir.IntType(32)
_VECTOR = ir.VectorType(_WORD, LANES)


def _rows(context: Any, builder: Any, array_type: Any, array: Any) -> list[Any]:
    """Pointers to the 16 rows of a uint32 array of shape (16, LANES), each as one vector."""
    data = context.make_array(array_type)(context, builder, array).data
    rows = builder.bitcast(data, _VECTOR.as_pointer())
    return [builder.gep(rows, [ir.Constant(_WORD, i)]) for i in range(16)]


def _rotate_left(builder: Any, value: Any, count: int) -> Any:
    high = builder.shl(value, ir.Constant(_VECTOR, [count] * LANES))
    low = builder.lshr(value, ir.Constant(_VECTOR, [32 - count] * LANES))
    return builder.or_(high, low)


@intrinsic
def _rounds(typingctx, x):
    """Twenty ChaCha rounds on x, uint32, shape (16, LANES), C order, in place.

    Written as vector code because LLVM keeps a numba array in memory: here each state word of the LANES blocks is one
    vector value, all sixteen stay in registers, and the words come three times as fast. LLVM splits the vectors where
    the processor's registers are narrower.
    """

    def generate(context, builder, signature, args):
        pointers = _rows(context, builder, signature.args[0], args[0])
        state = [cgutils.alloca_once(builder, _VECTOR) for _ in range(16)]
        for pointer, slot in zip(pointers, state, strict=True):
            builder.store(builder.load(pointer, align=4), slot)
        with cgutils.for_range(builder, ir.Constant(_WORD, 10)):
            values = [builder.load(slot) for slot in state]
            for a, b, c, d in _COLUMNS_THEN_DIAGONALS:
                for to, source, mixed, count in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                    values[to] = builder.add(values[to], values[source])
                    values[mixed] = _rotate_left(builder, builder.xor(values[mixed], values[to]), count)
            for value, slot in zip(values, state, strict=True):
                builder.store(value, slot)
        for pointer, slot in zip(pointers, state, strict=True):
            builder.store(builder.load(slot), pointer, align=4)
        return context.get_dummy_value()

    return types.void(x), generate


@intrinsic
def _transpose(typingctx, x):
    """Transpose x, uint32, shape (16, LANES), C order, in place: from one row per state word to one row per block.

    Four rounds of exchanges between rows `step` apart, each a pair of shuffles.
    """

    def generate(context, builder, signature, args):
        pointers = _rows(context, builder, signature.args[0], args[0])
        rows = [builder.load(pointer, align=4) for pointer in pointers]
        for step in (1, 2, 4, 8):
            # Lane l of the second operand of a shuffle has number LANES + l.
            upper = [LANES + lane - step if lane & step else lane for lane in range(LANES)]
            lower = [LANES + lane if lane & step else lane + step for lane in range(LANES)]
            masks = [ir.Constant(_VECTOR, mask) for mask in (upper, lower)]
            for i in range(16):
                if not i & step:
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        for row, pointer in zip(rows, pointers, strict=True):
            builder.store(row, pointer, align=4)
        return context.get_dummy_value()

    return types.void(x), generate


@numba.njit(inline="always")
def _add(x, row, word):
    for j in range(LANES):
        x[row, j] += word


@numba.njit(inline="always")
def _fill(x, row, word):
    for j in range(LANES):
        x[row, j] = word


@numba.njit(inline="always")
def _constants(x):
    _fill(x, 0, np.uint32(0x61707865))
    _fill(x, 1, np.uint32(0x3320646E))
    _fill(x, 2, np.uint32(0x79622D32))
    _fill(x, 3, np.uint32(0x6B206574))


@compiled()
def _subkeys(use_key, groups, out):
    n, depth, _ = groups.shape
    x = np.empty((16, LANES), np.uint32)
    for start in range(0, n, LANES):
        width = min(LANES, n - start)
        for g in range(depth):
            if g == 0:
                for i in range(8):
                    _fill(x, 4 + i, use_key[i])
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


@numba.njit(inline="always")
def _initial_word(word, keys, row, block, stream, aux):
    """State word `word` before the rounds, which the block adds to the one after; `keys[row]` is the block's key."""
    if word >= 4 and word < 12:
        return keys[row, word - 4]
    if word == 0:
        return np.uint32(0x61707865)
    if word == 1:
        return np.uint32(0x3320646E)
    if word == 2:
        return np.uint32(0x79622D32)
    if word == 3:
        return np.uint32(0x6B206574)
    if word == 12:
        return block
    if word == 13:
        return np.uint32(0)
    if word == 14:
        return stream
    return aux


@compiled()
def _words_of(use_key, ids, positions, window, stream, aux, out):
    n = positions.shape[0]
    depth = max(1, (window + 3) // 4)
    x = np.empty((16, LANES), np.uint32)
    keys = np.empty((LANES, 8), np.uint32)
    for start in range(0, n, LANES):
        width = min(LANES, n - start)
        for i in range(8):
            _fill(x, 4 + i, use_key[i])
        for g in range(depth):
            if g > 0:
                for i in range(4):
                    for j in range(LANES):
                        x[4 + i, j] = x[i, j]
                        x[8 + i, j] = x[12 + i, j]
            _constants(x)
            unused = 4 - min(4, window - 4 * g)
            for i in range(unused):
                _fill(x, 12 + i, PAD)
            for j in range(LANES):
                first = positions[start + min(j, width - 1)] - window + 4 * g - unused
                for i in range(unused, 4):
                    x[12 + i, j] = ids[first + i]
            _rounds(x)
        for j in range(LANES):
            for i in range(4):
                keys[j, i] = x[i, j]
                keys[j, 4 + i] = x[12 + i, j]
        for i in range(4):
            for j in range(LANES):
                x[4 + i, j] = x[i, j]
                x[8 + i, j] = x[12 + i, j]
        _constants(x)
        for j in range(LANES):
            x[12, j] = ids[positions[start + min(j, width - 1)]] >> np.uint32(4)
        _fill(x, 13, np.uint32(0))
        _fill(x, 14, stream)
        _fill(x, 15, aux)
        _rounds(x)
        for j in range(width):
            token = ids[positions[start + j]]
            word = token & np.uint32(15)
            out[start + j] = x[word, j] + _initial_word(word, keys, j, token >> np.uint32(4), stream, aux)


@compiled()
def _words_at(keys, candidates, stream, aux, out):
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
            out[row] = x[word, j] + _initial_word(word, keys, row, candidates[row] >> np.uint32(4), stream, aux)


@compiled()
def _keystream(key, first_block, stream, aux, x):
    """Blocks first_block .. first_block + LANES - 1 of one key into x, shape (LANES, 16): keystream words in order."""
    _constants(x)
    for i in range(8):
        _fill(x, 4 + i, key[i])
    for j in range(LANES):
        x[12, j] = np.uint32(first_block + j)
    _fill(x, 13, np.uint32(0))
    _fill(x, 14, stream)
    _fill(x, 15, aux)
    _rounds(x)
    _add(x, 0, np.uint32(0x61707865))
    _add(x, 1, np.uint32(0x3320646E))
    _add(x, 2, np.uint32(0x79622D32))
    _add(x, 3, np.uint32(0x6B206574))
    for i in range(8):
        _add(x, 4 + i, key[i])
    for j in range(LANES):
        x[12, j] += np.uint32(first_block + j)
    _add(x, 14, stream)
    _add(x, 15, aux)
    _transpose(x)


@compiled()
def _expand(keys, vocabulary, stream, aux, out):
    tile = np.empty((LANES, 16), np.uint32)
    words = tile.reshape(16 * LANES)
    for row in range(keys.shape[0]):
        for start in range(0, vocabulary, 16 * LANES):
            _keystream(keys[row], start // 16, stream, aux, tile)
            count = min(16 * LANES, vocabulary - start)
            out[row, start : start + count] = words[:count]


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


def words_of(
    use_key: Words, ids: Words, positions: npt.NDArray[np.int64], window: int, stream: int = 0, aux: int = 0
) -> Words:
    """As `prf.words_of`: contexts are read where they lie, and no subkey is written to memory."""
    out = np.empty(len(positions), dtype=np.uint32)
    _words_of(use_key, ids, positions, window, np.uint32(stream), np.uint32(aux), out)
    return out


def expand(use_key: Words, contexts: Words, vocabulary: int, stream: int = 0, aux: int = 0) -> Words:
    """As `chacha.expand`."""
    out = np.empty((len(contexts), vocabulary), dtype=np.uint32)
    _expand(subkeys(use_key, contexts), vocabulary, np.uint32(stream), np.uint32(aux), out)
    return out
