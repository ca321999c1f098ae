"""The PRF on the fastest backend that is worth its start-up: numpy for a few words, numba for many.

Every backend gives the same words, so the choice changes time and nothing else.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from assay.kernels import chacha
from assay.kernels.chacha import Words

Backend = Literal["auto", "numpy", "numba"]

# Loading compiled numba code costs about half a second; numpy does this many blocks meanwhile.
_NUMPY_BLOCKS = 100_000


def _use_numba(backend: Backend, blocks: int) -> bool:
    if backend not in ("auto", "numpy", "numba"):
        raise ValueError(f"backend must be 'auto', 'numpy' or 'numba', got {backend!r}.")
    return backend == "numba" or (backend == "auto" and blocks > _NUMPY_BLOCKS)


def words_at(
    use_key: Words, contexts: Words, candidates: Words, *, stream: int = 0, aux: int = 0, backend: Backend = "auto"
) -> Words:
    """PRF(context_i, stream, aux, candidate_i) per row; see `chacha.words_at` for shapes."""
    if _use_numba(backend, 2 * len(candidates)):
        from assay.kernels import chacha_numba

        return chacha_numba.words_at(use_key, contexts, candidates, stream, aux)
    return chacha.words_at(use_key, contexts, candidates, stream, aux)


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
