"""The PRF on the fastest backend that is worth its start-up: numpy for a few words, numba for many or once loaded.

Every backend gives the same words, so the choice changes time and nothing else.
"""

from __future__ import annotations

import sys
from typing import Literal

import numpy as np
import numpy.typing as npt

from assay.kernels import chacha
from assay.kernels.chacha import Words

Backend = Literal["auto", "numpy", "numba"]

# Loading compiled numba code costs about half a second; numpy does this many blocks meanwhile, so it is loaded once as
# many were asked for. Once it is loaded, numba wins for a single block already: numpy's many small steps take two
# milliseconds, which count as _CALL blocks.
_NUMPY_BLOCKS = 100_000
_CALL = 400
_COMPILED = "assay.kernels.chacha_numba"
_blocks_by_numpy = 0


def load_compiled() -> None:
    """Load the compiled code now: what a process does that answers many callers, before the first of them waits."""
    from assay.kernels import chacha_numba, dedup

    ids = np.zeros(4, dtype=np.uint32)
    chacha_numba.words_of(np.zeros(8, dtype=np.uint32), ids, np.array([2], dtype=np.int64), 2)
    dedup.first_occurrences_numba(ids, np.array([0, 4], dtype=np.int64), 2)


def _use_numba(backend: Backend, blocks: int) -> bool:
    global _blocks_by_numpy  # time alone depends on it, never a word
    if backend not in ("auto", "numpy", "numba"):
        raise ValueError(f"backend must be 'auto', 'numpy' or 'numba', got {backend!r}.")
    if backend != "auto":
        return backend == "numba"
    if _COMPILED in sys.modules:
        return True
    _blocks_by_numpy += blocks + _CALL
    return _blocks_by_numpy > _NUMPY_BLOCKS


def words_at(
    use_key: Words, contexts: Words, candidates: Words, *, stream: int = 0, aux: int = 0, backend: Backend = "auto"
) -> Words:
    """PRF(context_i, stream, aux, candidate_i) per row; see `chacha.words_at` for shapes."""
    if _use_numba(backend, 2 * len(candidates)):
        from assay.kernels import chacha_numba

        return chacha_numba.words_at(use_key, contexts, candidates, stream, aux)
    return chacha.words_at(use_key, contexts, candidates, stream, aux)


def words_of(
    use_key: Words,
    ids: Words,
    positions: npt.NDArray[np.int64],
    window: int,
    *,
    stream: int = 0,
    aux: int = 0,
    backend: Backend = "auto",
) -> Words:
    """The PRF word of each token ids[p], p in positions, in the context of the `window` tokens before it.

    Parameters
    ----------
    use_key
        uint32, shape (8,).
    ids
        uint32, shape (n,).
    positions
        int64, shape (k,), each in [window, n).
    window
        Context width, >= 1.

    Returns
    -------
    uint32, shape (k,).
    """
    if len(positions) and not (window <= positions.min() and positions.max() < len(ids)):
        raise ValueError(f"positions must be in [{window}, {len(ids)}), got {positions.min()} to {positions.max()}.")
    if _use_numba(backend, 2 * len(positions)):
        from assay.kernels import chacha_numba

        return chacha_numba.words_of(use_key, ids, positions, window, stream, aux)
    words = np.empty(len(positions), dtype=np.uint32)
    step = 1 << 16  # a piece of the contexts at a time bounds memory on documents of any length
    for start in range(0, len(positions), step):
        chosen = positions[start : start + step]
        contexts = np.lib.stride_tricks.sliding_window_view(ids, window)[chosen - window]
        words[start : start + step] = chacha.words_at(use_key, contexts, ids[chosen], stream, aux)
    return words


def expand(
    use_key: Words, contexts: Words, vocabulary: int, *, stream: int = 0, aux: int = 0, backend: Backend = "auto"
) -> Words:
    """PRF(context_i, stream, aux, v) for every v < vocabulary; see `chacha.expand` for shapes."""
    if _use_numba(backend, len(contexts) * (vocabulary // 16 + 2)):
        from assay.kernels import chacha_numba

        return chacha_numba.expand(use_key, contexts, vocabulary, stream, aux)
    return chacha.expand(use_key, contexts, vocabulary, stream, aux)


def race_times(words: Words) -> npt.NDArray[np.float64]:
    """Exponential race times E = -log(1 - r) of the sampler, r = min((f32(word) + 0.5) * 2**-32, 1 - 2**-24).

    Each step of r rounds to nearest in IEEE single precision; multiplying by a power of two is exact, so fused
    multiply-add cannot change it and every backend agrees. r lies in [2**-33, 1 - 2**-24]; small r wins the race.

    Returns
    -------
    float64, same shape as `words`, range [1.2e-10, 16.7].
    """
    r = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    # log1p, not log(1 - r): r is as small as 2**-33, where 1 - r is 1.
    times: npt.NDArray[np.float64] = -np.log1p(-np.minimum(r, np.float32(1 - 2.0**-24)).astype(np.float64))
    return times
