"""What the two SynthID contracts share: n-gram hashes, the rule for repeated contexts, the tournament's law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.watermark.foreign import ForeignConfig

LogWeights = npt.NDArray[np.float32] | npt.NDArray[np.float64]
States = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.uint64]

MAX_DEPTH = 64


@dataclass(frozen=True, kw_only=True)
class TournamentConfig(ForeignConfig):
    """Settings that both contracts have; the key is one integer per layer, in [-2**63, 2**63).

    Attributes
    ----------
    ngram_len
        In [2, 64]: a token is keyed by the ngram_len - 1 generated tokens before it. The prompt takes no part; before
        the first generated token stand zeros.
    depth
        Layers, in [1, 64]: the number of keys.
    context_history_size
        A step whose context occurred among the last so many is left unmarked; >= 1.
    skip_first_ngram_calls
        Whether the first ngram_len - 1 generated tokens are left unmarked.
    """

    lowest: ClassVar[int] = -(2**63)
    highest: ClassVar[int] = 2**63 - 1
    bits: ClassVar[int] = 63
    completion_only: ClassVar[bool] = True

    ngram_len: int = 5
    depth: int = 30
    context_history_size: int = 1024
    skip_first_ngram_calls: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("ngram_len", 2, 64), ("depth", 1, MAX_DEPTH), ("context_history_size", 1, 2**31)
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}.")
        if not isinstance(self.skip_first_ngram_calls, bool):
            raise ValueError(f"skip_first_ngram_calls must be True or False, got {self.skip_first_ngram_calls!r}.")

    @property
    def n_integers(self) -> int:
        """One key per layer."""
        return self.depth


def layer_keys(prf_key: Words) -> npt.NDArray[np.uint64]:
    """The keys as unsigned words, shape (depth,)."""
    return np.ascontiguousarray(prf_key).view("<u8").astype(np.uint64)


def hashes(ids: Words, width: int, first: int) -> States:
    """Hashes of all n-grams of `width` ids, shape (n - width + 1,)."""
    from assay.watermark.profiles import hashes_numba

    out = np.empty(len(ids), dtype=np.uint64)
    hashes_numba.fold_grams(ids, width - 1, width, np.uint64(first), out)
    return out[width - 1 :]


def padded(ids: Words, offsets: npt.NDArray[np.int64], config: TournamentConfig) -> tuple[Words, npt.NDArray[np.int64]]:
    """The documents with ngram_len - 1 zeros before each, and where each id has gone."""
    lead = config.ngram_len - 1
    moved = np.arange(len(ids)) + lead * np.repeat(np.arange(1, len(offsets)), np.diff(offsets))
    out = np.zeros(len(ids) + lead * (len(offsets) - 1), dtype=np.uint32)
    out[moved] = ids
    return out, moved


def new_contexts(contexts: States, offsets: npt.NDArray[np.int64], history: int) -> npt.NDArray[np.bool_]:
    """Which context hashes the generator's memory of the last `history` steps does not hold; a row per document."""
    from assay.watermark.profiles import hashes_numba

    out = np.zeros(len(contexts), dtype=np.bool_)
    hashes_numba.recent(contexts, offsets, min(history, 2**31), out)
    return out


def first_states(
    states: States, eligible: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which eligible places show a state for the first time in their document."""
    from assay.watermark.profiles import mersenne_numba

    out = np.zeros(len(states), dtype=np.bool_)
    high, low = (states >> np.uint64(32)).astype(np.uint32), (states & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    mersenne_numba.first_pairs(high, low, eligible, offsets, out)
    return out


def tournament_law(
    log_weights: npt.NDArray[np.floating], bits: Bits, depth: int, leaves: int = 2
) -> npt.NDArray[np.float64]:
    """One row's log-probabilities after the tournament: in each layer `leaves` tokens compete, a 1 beats a 0.

    For two leaves p <- p (1 + g - sum g p). Tokens of probability 0 stay so.

    Parameters
    ----------
    log_weights
        float32 or float64, shape (k,).
    bits
        uint64, shape (k,): bit l is the token's g-value in layer l.
    """
    from assay.watermark.profiles import hashes_numba

    exact = log_weights.astype(np.float64)
    p = np.exp(exact - exact.max())
    hashes_numba.tournament(p, bits, depth, leaves)
    with np.errstate(divide="ignore"):
        out: npt.NDArray[np.float64] = np.log(p)
    return out


def usable(weights: LogWeights) -> bool:
    """Whether a row can be drawn from; where not, the race says what is wrong with it."""
    return not np.isnan(weights).any() and bool(np.isfinite(weights.max()))


def real_history(row: npt.NDArray[np.int64], pad: int) -> Words:
    """A row without its leading padding."""
    real = np.flatnonzero(row != pad)
    return row[real[0] :].astype(np.uint32) if len(real) else np.empty(0, dtype=np.uint32)
