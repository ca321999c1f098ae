"""What the two SynthID contracts share: n-gram hashes, the rule for repeated contexts, the tournament's law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.watermark._coins import LogWeights
from assay.watermark.foreign import ForeignConfig
from assay.watermark.gumbel import real_history

States = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.uint64]

MAX_DEPTH = 64
MULTIPLIER = np.uint64(6364136223846793005)  # of the linear congruential hash


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


def gram_states(
    ids: Words, offsets: npt.NDArray[np.int64], config: TournamentConfig, first: int
) -> tuple[States, npt.NDArray[np.bool_]]:
    """The hash of the n-gram that ends at each generated id of documents, and whether the generator marks there.

    It does where the context is not among the last `context_history_size`, nor one that `skip_first_ngram_calls` skips.
    """
    long, moved = padded(ids, offsets, config)
    lead = config.ngram_len - 1
    grams, contexts = (hashes(long, width, first)[moved - lead] for width in (config.ngram_len, lead))
    marked = new_contexts(contexts, offsets, config.context_history_size)
    if config.skip_first_ngram_calls:
        marked &= np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets)) >= lead
    return grams, marked


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


def tilted_rows(
    ids: npt.NDArray[np.int64],
    log_weights: LogWeights,
    pad_token_id: int | None,
    config: TournamentConfig,
    *,
    first: int,
    bits_of: Callable[[States], Bits],
    leaves: int = 2,
) -> npt.NDArray[np.float64]:
    """log of the law after the tournament, for rows of GENERATED tokens (possibly none).

    Parameters
    ----------
    ids, log_weights, pad_token_id
        See `schemes.Sampler`.
    config
        The key's settings.
    first
        Where hashing begins.
    bits_of
        The g-values of states, bit l that of layer l.
    leaves
        As in `tournament_law`.
    """
    pad = -1 if pad_token_id is None else pad_token_id
    lead = config.ngram_len - 1
    out = log_weights.astype(np.float64)
    every = np.arange(log_weights.shape[1], dtype=np.uint64)
    for row, weights in zip(ids, out, strict=True):
        history = real_history(row, pad).astype(np.uint32)
        if not usable(weights) or (config.skip_first_ngram_calls and len(history) < lead):
            continue
        contexts = hashes(np.concatenate([np.zeros(lead, dtype=np.uint32), history]), lead, first)
        offsets = np.array([0, len(contexts)], dtype=np.int64)
        if new_contexts(contexts, offsets, config.context_history_size)[-1]:
            open_ids = np.flatnonzero(weights > -np.inf)
            bits = bits_of((contexts[-1] + every[open_ids]) * MULTIPLIER + np.uint64(1))
            weights[open_ids] = tournament_law(weights[open_ids], bits, config.depth, leaves)
    return out


def bit_columns(bits: Bits, depth: int) -> npt.NDArray[np.uint8]:
    """The g-values of each layer, 0 or 1: uint8, shape (n, depth)."""
    return ((bits[:, None] >> np.arange(depth, dtype=np.uint64)) & np.uint64(1)).astype(np.uint8)
