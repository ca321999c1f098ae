"""What the schemes with yes-or-no marks share: coins of a text, contexts that key a draw, noise that is not the mark.

A coin is one PRF input whose outcome a text shows. Each distinct coin counts once, at its first place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark import gumbel
from assay.watermark.schemes import Sampler

LogWeights = npt.NDArray[np.float32] | npt.NDArray[np.float64]

# Purposes of PRF words, in bits 31..24 of the stream. The key derivation separates schemes; these separate the roles
# within one, and from the races, which read stream 0.
MEMBER = 1 << 24
ANCHOR = 2 << 24
LAYERS = 3 << 24
ORDER = 4 << 24


@dataclass(frozen=True)
class Coins:
    """What a document shows under one key.

    Attributes
    ----------
    positions
        int64, shape (k,), ascending: the tokens that count; each distinct coin once, at its first place.
    outcomes
        bool, shape (k, m): m yes-or-no outcomes of each coin, independent under the null.
    n_tokens
        Tokens in the document.
    n_repeats_dropped
        Tokens that have a coin and were left out because it was counted before.
    """

    positions: npt.NDArray[np.int64]
    outcomes: npt.NDArray[np.bool_]
    n_tokens: int
    n_repeats_dropped: int


def after_prompt(
    positions: npt.NDArray[np.int64], outcomes: npt.NDArray[np.bool_], length: int, prompt_length: int, window: int
) -> Coins:
    """The coins of the text that follows a prompt; arguments as in `gumbel.after_prompt`, and the coins' outcomes."""
    counted, n_text, n_dropped = gumbel.after_prompt(positions, length, prompt_length, window)
    return Coins(positions[counted] - prompt_length, outcomes[counted], n_text, n_dropped)


def context_words(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    window: int,
    stream: int,
    *,
    backend: prf.Backend = "auto",
) -> tuple[npt.NDArray[np.int64], Words]:
    """First places of the distinct (context, token) pairs of documents end to end, and their PRF words.

    Returns
    -------
    positions
        int64, shape (k,), ascending, into `ids`.
    words
        uint32, shape (k,).
    """
    positions = np.flatnonzero(first_occurrences(ids, offsets, window + 1))
    return positions, prf.words_of(prf_key, ids, positions, window, stream=stream, backend=backend)


def plain_subkeys(ids: npt.NDArray[np.int64], pad: int, unmarked: Words) -> Words:
    """Subkeys, shape (rows, 8), of the noise that is not the mark: a function of the seed and the whole history."""
    from assay.kernels.race import subkeys

    histories = [gumbel._whole_history(row, pad) for row in ids]
    return subkeys(unmarked, np.stack(histories) if histories else np.empty((0, 4), dtype=np.uint32))


def tilted_sampler(
    tilted: Callable[[npt.NDArray[np.int64], LogWeights, int | None], LogWeights], unmarked: Words
) -> Sampler:
    """A sampler whose mark is in the tilt of the weights alone: the noise is keyed by the seed and the whole history.

    Parameters
    ----------
    tilted
        Gives the log-weights with the mark; arguments as in `schemes.Sampler`.
    unmarked
        uint32, shape (8,): from `gumbel.unmarked_key`.
    """

    def draw(ids: npt.NDArray[np.int64], log_weights: LogWeights, pad_token_id: int | None) -> npt.NDArray[np.int64]:
        from assay.kernels import race

        weights = tilted(ids, log_weights, pad_token_id)
        return race.winners(plain_subkeys(ids, -1 if pad_token_id is None else pad_token_id, unmarked), weights)

    return draw


def check_window(window: object) -> None:
    """Refuses a context width that is not an integer in [1, 64]."""
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= 64:
        raise ValueError(f"window must be an integer in [1, 64], got {window!r}.")


def check_real(name: str, value: object, accepted: str, *, low: float, high: float) -> float:
    """`value` as a float above `low` and up to `high`; `accepted` is the range in the message."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise ValueError(f"{name} must be a number in {accepted}, got {value!r}.")
    return float(value)


def threshold_of(gamma: float) -> int:
    """Words below this are members: floor(gamma 2**32), so that the chance of membership is never above gamma."""
    return int(gamma * 2.0**32)
