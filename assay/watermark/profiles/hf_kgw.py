"""hf-kgw: the green list of transformers' `WatermarkingConfig`, as its CPU generator draws it; no torch needed.

Under H0 the members of one seed's list that a text asks for are drawn without replacement, so the count of green coins
is a sum of independent hypergeometric variables with mean floor(V ratio) / V each. The real coin is (seed, target).
Reference: Kirchenbauer et al. (2023), arXiv:2301.10226 and 2306.04634; transformers 4.57 to 5.x.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words
from assay.kernels.dedup import first_occurrences
from assay.watermark._coins import Coins, LogWeights, tilted_sampler
from assay.watermark.foreign import ForeignConfig, as_integers
from assay.watermark.gumbel import after_prompt, real_history
from assay.watermark.schemes import Sampler, register

TABLE_SIZE = 1_000_003
CANDIDATES = 40  # selfhash tries this many of the most likely tokens
_MAX_VOCABULARY = 2**24
_CACHE_BYTES = 2**28


@register
@dataclass(frozen=True, kw_only=True)
class HfKgwConfig(ForeignConfig):
    """Settings of transformers' `WatermarkingConfig`; the key is one integer, its `hashing_key`, below 2**63.

    Attributes
    ----------
    vocab_size
        Width of the model's logits (`model.config.vocab_size`, often larger than the tokenizer's), in [2, 2**24]. The
        lists depend on it.
    greenlist_ratio
        In (0, 1); the list has floor(vocab_size * greenlist_ratio) tokens, at least 1.
    bias
        Added to the scores of green tokens, >= 0; for writing only.
    seeding_scheme
        "lefthash": the last token seeds the list. "selfhash": a min-hash of the window and the candidate itself does.
    context_width
        >= 1. Under "lefthash" it only says how many tokens at the start stay unmarked.

    Notes
    -----
    The lists are those of a CPU generator. A model that ran on a GPU drew other lists, from CUDA's generator; such a
    text is not found.
    """

    scheme: ClassVar[str] = "hf-kgw"
    version: ClassVar[int] = 1
    distortion_free: ClassVar[bool] = False
    lowest: ClassVar[int] = 1
    highest: ClassVar[int] = 2**63 - 1
    bits: ClassVar[int] = 63

    vocab_size: int
    greenlist_ratio: float = 0.25
    bias: float = 2.0
    seeding_scheme: Literal["lefthash", "selfhash"] = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (("vocab_size", 2, _MAX_VOCABULARY), ("context_width", 1, 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}.")
        ratio, bias = self.greenlist_ratio, self.bias
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 < ratio < 1.0:
            raise ValueError(f"greenlist_ratio must be a number in (0, 1), got {ratio!r}.")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not 0.0 <= bias < float("inf"):
            raise ValueError(f"bias must be a finite number of at least 0, got {bias!r}.")
        object.__setattr__(self, "bias", float(bias))  # 2 and 2.0 must not derive two keys
        if self.seeding_scheme not in ("lefthash", "selfhash"):
            raise ValueError(f"seeding_scheme must be 'lefthash' or 'selfhash', got {self.seeding_scheme!r}.")
        if self.list_size < 1:
            raise ValueError(
                f"greenlist_ratio must leave at least one green token of {self.vocab_size}, got {ratio!r}."
            )

    @property
    def list_size(self) -> int:
        """Tokens in each green list: floor(vocab_size * greenlist_ratio), rounded as transformers does."""
        return int(self.vocab_size * self.greenlist_ratio)

    @property
    def reach(self) -> int:
        """How many tokens must precede one for it to have a coin."""
        return self.context_width - (self.seeding_scheme == "selfhash")


class GreenLists:
    """Bit rows of lists by seed, made on first use and kept: a warm look-up costs one gather.

    Parameters
    ----------
    vocab_size, list_size
        Ids in all, and in each list.
    max_bytes
        Memory for rows of ceil(vocab_size / 8) bytes; when it is full, it starts anew.
    """

    def __init__(self, vocab_size: int, list_size: int, max_bytes: int = _CACHE_BYTES) -> None:
        self._vocab_size = vocab_size
        self._list_size = list_size
        width = (vocab_size + 7) // 8
        self._limit = max(1, min(max_bytes // width, 2**22))
        self._rows = np.empty((self._limit, width), dtype=np.uint8)  # pages are taken as rows are filled
        slots = 1 << (2 * self._limit - 1).bit_length()
        self._table_seeds = np.empty(slots, dtype=np.uint32)
        self._table_rows = np.full(slots, -1, dtype=np.int32)
        self._used = 0
        self._lock = threading.Lock()

    def bits(self, seeds: Words, targets: Words) -> npt.NDArray[np.bool_]:
        """Whether targets[i] is in the list of seeds[i].

        Parameters
        ----------
        seeds, targets
            uint32, shape (n,); targets below `vocab_size`.
        """
        from assay.watermark.profiles import mersenne_numba

        out = np.zeros(len(seeds), dtype=np.bool_)
        start = 0
        with self._lock:
            while start < len(seeds):
                added = np.empty(min(self._limit, len(seeds) - start), dtype=np.uint32)
                table = (self._rows, self._table_seeds, self._table_rows)
                rest = seeds[start:], targets[start:]
                reached, count = mersenne_numba.look_up(*rest, *table, self._used, self._limit, added, out[start:])
                if count:
                    rows = self._rows[self._used : self._used + count]
                    mersenne_numba.fill_rows(added[:count], self._vocab_size, self._list_size, rows)
                    self._used += count
                    piece = seeds[start : start + reached], targets[start : start + reached]
                    mersenne_numba.look_up(*piece, *table, self._used, self._limit, added, out[start : start + reached])
                start += reached
                if start < len(seeds):
                    self._table_rows[:] = -1
                    self._used = 0
        return out


@functools.lru_cache(maxsize=2)
def green_lists(vocab_size: int, list_size: int) -> GreenLists:
    """The process's lists of one size; they depend on no key, only on seeds."""
    return GreenLists(vocab_size, list_size)


@functools.lru_cache(maxsize=4)
def _fixed_table(seed: int) -> npt.NDArray[np.int32]:
    """The permutation of 0 .. TABLE_SIZE - 1 that selfhash looks tokens up in."""
    from assay.watermark.profiles import mersenne_numba

    order = np.arange(TABLE_SIZE, dtype=np.int32)
    places, chosen = np.empty_like(order), np.empty_like(order)
    mersenne_numba.shuffle(np.uint32(seed), order, places, chosen)
    return chosen


def left_seeds(tokens: Words, key: int) -> Words:
    """Low 32 bits, all that the CPU generator uses, of key * token mod 2**64 - 1.

    Parameters
    ----------
    tokens
        uint32, any shape.
    key
        In [0, 2**63).
    """
    t = tokens.astype(np.uint64)
    low_product, high_product = np.uint64(key & 0xFFFFFFFF) * t, np.uint64(key >> 32) * t
    low = low_product + (high_product << np.uint64(32))
    high = (high_product >> np.uint64(32)) + (low < low_product)
    total = low + high  # 2**64 is 1 modulo 2**64 - 1
    total += total < low
    total[total == np.uint64(2**64 - 1)] = 0
    seeds: Words = (total & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return seeds


def self_seeds(ids: Words, width: int, key: int) -> Words:
    """Selfhash seeds of the windows of `width` ids that end at each place; places before width - 1 hold zeros."""
    from assay.watermark.profiles import mersenne_numba

    products = np.zeros(len(ids), dtype=np.int64)
    mersenne_numba.smallest_products(_fixed_table(key & 0xFFFFFFFF), ids, width, np.int64(key), products)
    # A negative minimum becomes itself + 2**64 - 1 under Python's modulo.
    seeds: Words = ((products - (products < 0)) & 0xFFFFFFFF).astype(np.uint32)
    return seeds


def _seeds(ids: Words, prf_key: Words, config: HfKgwConfig) -> Words:
    (key,) = as_integers(prf_key)
    if config.seeding_scheme == "selfhash":
        return self_seeds(ids, config.context_width, key)
    previous = np.zeros_like(ids)
    previous[1:] = ids[:-1]
    return left_seeds(previous, key)


def _checked(ids: Words, config: HfKgwConfig) -> Words:
    if len(ids) and int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"tokens must be below vocab_size {config.vocab_size} of the key's settings, got {int(ids.max())}. "
            "Is this the right tokenizer, and the right width of the model's logits?"
        )
    return ids


def scan(
    ids: Words,
    offsets: npt.NDArray[np.int64],
    prf_key: Words,
    config: HfKgwConfig,
    *,
    prompt_length: int = 0,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Words]:
    """Counted coins of documents that lie end to end: places, outcomes and seeds.

    Each (seed, target) counts once per document, at its first place. Under "lefthash" a token that follows token 0 does
    not count: its seed is 0 whatever the key.

    Parameters
    ----------
    ids
        uint32, shape (n,), below `config.vocab_size`.
    offsets
        int64, shape (documents + 1,).
    prf_key
        uint32, shape (2,): from `keys.use_key`.
    config
        The key's settings.
    prompt_length
        Places before it give context and do not count; for a single document.

    Returns
    -------
    positions
        int64, shape (k,), ascending, into `ids`.
    green
        bool, shape (k,).
    seeds
        uint32, shape (k,): which list each coin is of.
    """
    from assay.watermark.profiles import mersenne_numba

    seeds = _seeds(_checked(ids, config), prf_key, config)
    places = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
    eligible = (places >= config.reach) & (np.arange(len(ids)) >= prompt_length)
    if config.seeding_scheme == "lefthash":
        eligible[1:] &= ids[:-1] != 0
    first = np.zeros(len(ids), dtype=np.bool_)
    mersenne_numba.first_pairs(seeds, ids, eligible, offsets, first)
    positions = np.flatnonzero(first)
    lists = green_lists(config.vocab_size, config.list_size)
    return positions, lists.bits(seeds[positions], ids[positions]), seeds[positions]


def observe(ids: Words, prf_key: Words, config: HfKgwConfig, *, prompt_length: int = 0) -> Coins:
    """The coins of a text that follows a prompt, which gives context and is not itself tested; see `scan`."""
    offsets = np.array([0, len(ids)], dtype=np.int64)
    positions, green, _ = scan(ids, offsets, prf_key, config, prompt_length=prompt_length)
    _, n_text, n_dropped = after_prompt(positions, len(ids), prompt_length, config.reach)
    return Coins(positions - prompt_length, green[:, None], n_text, n_dropped)


def official_counts(
    ids: Words, prf_key: Words, config: HfKgwConfig, *, ignore_repeated_ngrams: bool = False
) -> tuple[int, int]:
    """Tokens scored and green tokens as transformers' `WatermarkDetector` counts them; not a basis for a p-value.

    Parameters
    ----------
    ids
        uint32, shape (n,): without the begin-of-sequence token, which transformers strips.
    prf_key, config
        As `scan`.
    ignore_repeated_ngrams
        Count each distinct n-gram once.
    """
    width = config.reach + 1
    where = np.arange(config.reach, len(ids))
    if ignore_repeated_ngrams:
        where = np.flatnonzero(first_occurrences(ids, np.array([0, len(ids)], dtype=np.int64), width))
    seeds = _seeds(_checked(ids, config), prf_key, config)
    green = green_lists(config.vocab_size, config.list_size).bits(seeds[where], ids[where])
    return len(where), int(np.sum(green))


def tilted_log_weights(
    ids: npt.NDArray[np.int64],
    log_weights: LogWeights,
    pad_token_id: int | None,
    prf_key: Words,
    config: HfKgwConfig,
) -> LogWeights:
    """The scores after the bias, as transformers' processor gives them for rows without padding.

    Parameters
    ----------
    ids, log_weights, pad_token_id
        See `schemes.Sampler`; log_weights has `config.vocab_size` columns.
    """
    if log_weights.shape[1] != config.vocab_size:
        raise ValueError(
            f"log_weights must have vocab_size {config.vocab_size} columns, got {log_weights.shape[1]}. "
            "Make the key with the width of the model's logits."
        )
    (key,) = as_integers(prf_key)
    pad = -1 if pad_token_id is None else pad_token_id
    out = log_weights.copy()
    for row, weights in zip(ids, out, strict=True):
        history = real_history(row, pad).astype(np.uint32)
        if len(history) >= config.context_width:
            weights[_green_ids(history, weights, key, config)] += config.bias
    return out


def _green_ids(history: Words, weights: LogWeights, key: int, config: HfKgwConfig) -> npt.NDArray[np.int64]:
    """The ids that get the bias after one history."""
    from assay.watermark.profiles import mersenne_numba

    if config.seeding_scheme == "lefthash":
        lists = green_lists(config.vocab_size, config.list_size)
        every = np.arange(config.vocab_size, dtype=np.uint32)
        return np.flatnonzero(lists.bits(np.full(len(every), left_seeds(history[-1:], key)[0]), every))
    count = min(CANDIDATES, len(weights))
    likely = np.argpartition(-weights, count - 1)[:count].astype(np.uint32)
    windows = np.empty((count, config.context_width), dtype=np.uint32)
    windows[:, :-1] = history[len(history) - config.context_width + 1 :]
    windows[:, -1] = likely
    seeds = self_seeds(windows.ravel(), config.context_width, key)[config.context_width - 1 :: config.context_width]
    green = np.empty(count, dtype=np.bool_)
    mersenne_numba.own_members(seeds, likely, config.vocab_size, config.list_size, green)
    return likely[green].astype(np.int64)


def sampler(prf_key: Words, config: HfKgwConfig, unmarked: Words) -> Sampler:
    """See `schemes.Sampler`. The noise of the draw is keyed by the whole history; the mark is in the tilt alone."""
    return tilted_sampler(functools.partial(tilted_log_weights, prf_key=prf_key, config=config), unmarked)
