"""Sequence watermark: a keyed real per block of text, decoded through the model's cumulated law.

A block is written exactly when its real falls into an interval as long as the block's probability rho: the law of the
text is the model's, and without the key the interval is hit with chance rho. This is the most powerful watermark there
is, realised on texts of any length. Reference: Huang et al. (2023), Thm 3.2, arXiv:2312.07930; Witten, Neal and Cleary
(1987) for arithmetic decoding.

Precision: reals and intervals are integers on a grid of 2**128 points, narrowed by exact integer arithmetic; the law of
a token is rounded to multiples of 2**-52. PRF inputs: the 128-bit digest of the nonce and the place of the block's
first token, five context words; a block's real is words 0 to 3 of stream 0. No other scheme shares a key with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.watermark.keys import KeepsKeys, SecretKey
from assay.watermark.schemes import SchemeConfig, register

GRID_BITS = 128
GRID = 1 << GRID_BITS
MAX_BLOCK_BITS = 64
WEIGHT_BITS = 52

Cumulated = npt.NDArray[np.int64]


@register
@dataclass(frozen=True, kw_only=True)
class SequenceConfig(SchemeConfig):
    """Settings of the sequence watermark.

    Attributes
    ----------
    block_bits
        A block ends with the token that takes its interval to 2**-block_bits or below, in [0, 64]; 0 gives every token
        a real of its own. The evidence of a text does not depend on it, but the cost of rounding does: where generator
        and detector may differ by e in log-probability, intervals are widened by about e, so blocks must stay well
        above e; 0 for half precision.
    """

    scheme: ClassVar[str] = "sequence"
    version: ClassVar[int] = 1

    block_bits: int = 4

    def __post_init__(self) -> None:
        bits = self.block_bits
        if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= MAX_BLOCK_BITS:
            raise ValueError(f"block_bits must be an integer in [0, {MAX_BLOCK_BITS}], got {bits!r}.")

    @property
    def limit(self) -> int:
        """Width on the grid at which a block ends."""
        return GRID >> self.block_bits


@dataclass(frozen=True)
class Interval:
    """The part of the grid whose reals write the block so far.

    Attributes
    ----------
    start
        Place in the text of the block's first token.
    low, width
        The grid points low .. low + width - 1.
    """

    start: int
    low: int = 0
    width: int = GRID

    def narrowed(self, before: int, after: int, total: int) -> Interval:
        """The part between two cumulated weights, in proportion, rounded down to the grid."""
        low = self.width * before // total
        return Interval(self.start, self.low + low, self.width * after // total - low)


def config_of(key: SecretKey) -> SequenceConfig:
    """The key's settings, checked to be those of this scheme."""
    if not isinstance(key, SecretKey) or not isinstance(key.config, SequenceConfig):
        got = f"{key.config.tag!r} (key {key.id!r})" if isinstance(key, SecretKey) else type(key).__name__
        raise ValueError(
            f"key must be for scheme 'sequence', got {got}. Make one with SecretKey.generate(config=SequenceConfig())."
        )
    return key.config


def nonce_words(nonce: bytes) -> Words:
    """The nonce as four words that key its reals.

    Parameters
    ----------
    nonce
        At least 8 bytes that no other text under this key has: a random number, or the id of the request. It is not
        secret, and detection needs it.

    Returns
    -------
    uint32, shape (4,).

    Raises
    ------
    ValueError
        If it is not bytes, or shorter.
    """
    if not isinstance(nonce, bytes) or len(nonce) < 8:
        got = f"{len(nonce)} bytes" if isinstance(nonce, bytes) else type(nonce).__name__
        raise ValueError(f"nonce must be at least 8 bytes, got {got}. Use secrets.token_bytes(16), and keep it.")
    digest = hashlib.blake2b(nonce, person=b"assay-nonce", digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)


def reals(prf_key: Words, nonces: Words, starts: npt.ArrayLike) -> list[int]:
    """The keyed reals of blocks: uniform on 0 .. 2**128 - 1 and independent without the key.

    Parameters
    ----------
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    nonces
        uint32, shape (n, 4) or (4,): from `nonce_words`.
    starts
        Integers, shape (n,), in [0, 2**32): places of the blocks' first tokens in their texts.
    """
    places = np.asarray(starts, dtype=np.uint32)
    contexts = np.column_stack([np.broadcast_to(nonces, (len(places), 4)), places])
    order = np.tile(np.arange(4, dtype=np.uint32), len(places))
    words = prf.words_at(prf_key, np.repeat(contexts, 4, axis=0), order).astype("<u4").reshape(-1, 4)
    return [int.from_bytes(row.tobytes(), "little") for row in words]


def cumulated(log_probs: npt.NDArray[np.float32] | npt.NDArray[np.float64]) -> Cumulated:
    """The law of a token as cumulated whole weights, in the order of the ids.

    Parameters
    ----------
    log_probs
        float32 or float64, shape (V,): natural log, normalised or not; -inf for a token that must not be drawn.

    Returns
    -------
    int64, shape (V + 1,), from 0 to about 2**52. A token below 2**-53 has no weight and is not drawn.

    Raises
    ------
    ValueError
        If a value is NaN or +inf, or all are -inf.
    """
    values = np.asarray(log_probs, dtype=np.float64)
    top = float(values.max(initial=-np.inf))
    if not np.isfinite(top):  # NaN spreads through max
        raise ValueError(f"log_probs must have a finite largest value and no NaN, got {top}.")
    p = np.exp(values - top)
    weights = np.rint(p * (2.0**WEIGHT_BITS / p.sum())).astype(np.int64)
    out: Cumulated = np.zeros(len(weights) + 1, dtype=np.int64)
    np.cumsum(weights, out=out[1:])
    return out


def draw(interval: Interval, point: int, law: Cumulated) -> tuple[int, Interval]:
    """The next token of a block, and the interval that is left.

    Guarantee: if `point` is uniform on the interval, the token has the law's weights up to 2**-64 of the interval, and
    given the token `point` is uniform on what is left.

    Parameters
    ----------
    interval
        Of the block so far.
    point
        The block's real; it lies in the interval.
    law
        From `cumulated`.
    """
    total = int(law[-1])
    # floor(width * c / total) <= offset exactly where c is at most this:
    most = ((point - interval.low + 1) * total - 1) // interval.width
    token = int(np.searchsorted(law, most, side="right")) - 1
    return token, interval.narrowed(int(law[token]), int(law[token + 1]), total)


class SequenceDecoder(KeepsKeys):
    """Chooses the tokens of one or more texts, each from the reals of its nonce.

    Unlike a token-wise sampler it must see every law of a text in order, because the interval is the memory of the
    laws: prompt lookup, assisted decoding and restarts within a text are not possible with it.

    Parameters
    ----------
    prf_key
        uint32, shape (8,): from `keys.use_key`.
    nonces
        One per text; see `nonce_words`.
    config
        The key's settings.
    """

    def __init__(self, prf_key: Words, nonces: Sequence[bytes], config: SequenceConfig) -> None:
        self._prf_key = prf_key
        self._nonces = np.array([nonce_words(nonce) for nonce in nonces], dtype=np.uint32).reshape(-1, 4)
        self._limit = config.limit
        self._place = 0
        self._blocks = [Interval(0) for _ in nonces]
        self._reals = reals(prf_key, self._nonces, np.zeros(len(nonces)))

    def __call__(
        self, ids: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float32] | npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        """The next token of every text.

        Parameters
        ----------
        ids
            Not used: the interval says all that matters of the tokens so far.
        log_probs
            Shape (texts, V): see `cumulated`.

        Returns
        -------
        int64, shape (texts,).
        """
        tokens = np.empty(len(log_probs), dtype=np.int64)
        self._place += 1
        for row, law in enumerate(log_probs):
            tokens[row], self._blocks[row] = draw(self._blocks[row], self._reals[row], cumulated(law))
        over = [row for row, block in enumerate(self._blocks) if block.width <= self._limit]
        fresh = reals(self._prf_key, self._nonces[over], np.full(len(over), self._place)) if over else []
        for row, point in zip(over, fresh, strict=True):
            self._blocks[row], self._reals[row] = Interval(self._place), point
        return tokens

    def __repr__(self) -> str:
        # Nothing of the reals or the key.
        return f"SequenceDecoder({len(self._blocks)} texts, {self._place} tokens drawn)"
