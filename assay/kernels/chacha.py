"""ChaCha20 and HChaCha20 on arrays: the numpy reference that every other backend must match word for word.

A word of XChaCha20 keystream is a uniform 32-bit number to anyone without the key; it is the PRF of every scheme.
Reference: RFC 8439, section 2.3 (ChaCha20 block); draft-irtf-cfrg-xchacha-03, section 2.2 (HChaCha20).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

PAD = np.uint32(0xFFFFFFFF)
"""Fills the unused leading words of a context group. No token id may have this value."""

_SIGMA = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_COLUMNS_THEN_DIAGONALS = (
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)
_TILE = 4096  # rows permuted at a time: 16 words x 4096 rows is 256 KiB and stays in the second-level cache


def _rotate_left(x: Words, count: int) -> Words:
    return (x << np.uint32(count)) | (x >> np.uint32(32 - count))


def _permute(state: list[Words]) -> None:
    """Twenty ChaCha rounds in place; `state` holds 16 arrays of equal shape, one per state word."""
    for _ in range(10):
        for a, b, c, d in _COLUMNS_THEN_DIAGONALS:
            state[a] = state[a] + state[b]
            state[d] = _rotate_left(state[d] ^ state[a], 16)
            state[c] = state[c] + state[d]
            state[b] = _rotate_left(state[b] ^ state[c], 12)
            state[a] = state[a] + state[b]
            state[d] = _rotate_left(state[d] ^ state[a], 8)
            state[c] = state[c] + state[d]
            state[b] = _rotate_left(state[b] ^ state[c], 7)


def _initial(keys: Words, tail: list[Words]) -> list[Words]:
    shape = np.broadcast_shapes(keys[..., 0].shape, *(word.shape for word in tail))
    constants = [np.full(shape, word, dtype=np.uint32) for word in _SIGMA]
    key_words = [np.broadcast_to(keys[..., i], shape) for i in range(8)]
    return constants + key_words + [np.broadcast_to(word, shape) for word in tail]


def hchacha20(keys: Words, inputs: Words) -> Words:
    """HChaCha20: a PRF from 16 bytes to 32 bytes.

    Parameters
    ----------
    keys
        uint32, shape (8,) or (n, 8): little-endian key words.
    inputs
        uint32, shape (n, 4): little-endian input words.

    Returns
    -------
    uint32, shape (n, 8): the subkeys.
    """
    out = np.empty((len(inputs), 8), dtype=np.uint32)
    for start in range(0, len(inputs), _TILE):
        rows = slice(start, start + _TILE)
        tile_keys = keys if keys.ndim == 1 else keys[rows]
        state = _initial(tile_keys, [inputs[rows, i] for i in range(4)])
        _permute(state)
        for i, word in enumerate((0, 1, 2, 3, 12, 13, 14, 15)):
            out[rows, i] = state[word]
    return out


def chacha20_blocks(keys: Words, counters: Words, nonce: tuple[int, int, int]) -> Words:
    """ChaCha20 keystream blocks, one per row.

    Parameters
    ----------
    keys
        uint32, shape (8,) or (n, 8).
    counters
        uint32, shape (n,): block counters.
    nonce
        Three 32-bit words, the same for all rows.

    Returns
    -------
    uint32, shape (n, 16): keystream words in stream order.
    """
    out = np.empty((len(counters), 16), dtype=np.uint32)
    fixed = [np.asarray(word, dtype=np.uint32) for word in nonce]
    for start in range(0, len(counters), _TILE):
        rows = slice(start, start + _TILE)
        tile_keys = keys if keys.ndim == 1 else keys[rows]
        state = _initial(tile_keys, [counters[rows], *fixed])
        first = list(state)
        _permute(state)
        for i in range(16):
            out[rows, i] = state[i] + first[i]
    return out


def context_groups(contexts: Words) -> Words:
    """Cut contexts into the 4-word groups that HChaCha20 absorbs; unused leading words of the last group are PAD.

    Parameters
    ----------
    contexts
        uint32, shape (n, h), oldest token first. h = 0 is the fixed-key case.

    Returns
    -------
    uint32, shape (n, g, 4) with g = max(1, ceil(h / 4)).
    """
    rows, width = contexts.shape
    groups = max(1, -(-width // 4))
    padded = np.full((rows, groups, 4), PAD, dtype=np.uint32)
    for g in range(groups):
        piece = contexts[:, 4 * g : 4 * g + 4]
        if piece.shape[1]:
            padded[:, g, 4 - piece.shape[1] :] = piece
    return padded


def subkeys(use_key: Words, contexts: Words) -> Words:
    """One ChaCha20 key per context: HChaCha20 over the context words, cascaded for contexts longer than four tokens.

    A fixed context width makes the cascade prefix-free, hence a PRF (Bellare, Canetti, Krawczyk 1996).

    Parameters
    ----------
    use_key
        uint32, shape (8,).
    contexts
        uint32, shape (n, h), oldest token first.

    Returns
    -------
    uint32, shape (n, 8).
    """
    groups = context_groups(contexts)
    keys: Words = use_key
    for g in range(groups.shape[1]):
        keys = hchacha20(keys, groups[:, g])
    return keys


def words_at(use_key: Words, contexts: Words, candidates: Words, stream: int = 0, aux: int = 0) -> Words:
    """PRF(context_i, stream, aux, candidate_i): one 32-bit word per row.

    Parameters
    ----------
    use_key
        uint32, shape (8,).
    contexts
        uint32, shape (n, h), oldest token first.
    candidates
        uint32, shape (n,): the token ids v; word v of the row's keystream is returned.
    stream
        Purpose in bits 31..24, layer or draw index below.
    aux
        Message symbol or rotation epoch, else 0.

    Returns
    -------
    uint32, shape (n,).
    """
    blocks = chacha20_blocks(subkeys(use_key, contexts), candidates >> np.uint32(4), (0, stream, aux))
    picked: Words = blocks[np.arange(len(candidates)), candidates & np.uint32(15)]
    return picked


def expand(use_key: Words, contexts: Words, vocabulary: int, stream: int = 0, aux: int = 0) -> Words:
    """PRF(context_i, stream, aux, v) for every v < vocabulary.

    Parameters
    ----------
    use_key
        uint32, shape (8,).
    contexts
        uint32, shape (n, h).
    vocabulary
        Number of candidates, >= 0.

    Returns
    -------
    uint32, shape (n, vocabulary).
    """
    counters = np.arange(-(-vocabulary // 16), dtype=np.uint32)
    out = np.empty((len(contexts), vocabulary), dtype=np.uint32)
    for row, key in enumerate(subkeys(use_key, contexts)):
        out[row] = chacha20_blocks(key, counters, (0, stream, aux)).reshape(-1)[:vocabulary]
    return out
