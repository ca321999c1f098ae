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


@numba.njit(cache=True, nogil=True)
def _race(keys, weights, out):  # type: ignore[no-untyped-def]
    rows, vocabulary = weights.shape
    buffer = np.empty(16 * LANES, np.uint32)
    top = np.float32(1.0) - np.float32(2.0**-24)
    for row in range(rows):
        best = np.inf
        winner = 0
        for start in range(0, vocabulary, 16 * LANES):
            count = min(16 * LANES, vocabulary - start)
            lightest = 0.0
            for j in range(count):
                lightest = max(lightest, weights[row, start + j])
            # The race is over for a whole tile whose weights are zero, the usual case after top-k or top-p.
            if lightest <= 0.0:
                continue
            _keystream(keys[row], start // 16, (count + 15) // 16, np.uint32(0), np.uint32(0), buffer)
            for j in range(count):
                weight = weights[row, start + j]
                r = min((np.float32(buffer[j]) + np.float32(0.5)) * np.float32(2.0**-32), top)
                # E = -log1p(-r) >= r, so the logarithm is needed only for the few that could still win.
                if np.float64(r) < best * weight:
                    time = -np.log1p(-np.float64(r)) / weight
                    if time < best:
                        best = time
                        winner = start + j
        out[row] = winner


def winners(keys: Words, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Winner of one exponential race per row; ties go to the lowest id.

    Parameters
    ----------
    keys
        uint32, shape (n, 8): one subkey per row.
    weights
        float64, shape (n, V), >= 0: unnormalised probabilities; at least one per row is positive.

    Returns
    -------
    int64, shape (n,).
    """
    out = np.empty(len(weights), dtype=np.int64)
    _race(keys, weights, out)
    return out


def winners_reference(
    use_key: Words, contexts: Words, weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """As `winners`, from contexts, in plain numpy: the oracle of its tests."""
    times = race_times(expand(use_key, contexts, weights.shape[1], backend="numpy"))
    with np.errstate(divide="ignore"):
        return np.argmin(times / weights, axis=1)
