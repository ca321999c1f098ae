"""Keyed Gumbel-max sampling fused into one Triton kernel: XChaCha20 words, Gumbel noise and argmax over the logits.

The words are those of `chacha`, bit for bit; logarithms are the card's, so that ids may differ from the CPU's where two
candidates' scores lie within about 1e-5 of each other. Detection uses the words alone. After top-k, top-p or min-p the
cipher runs for the survivors only, one block each, in every tile that has few enough of them.
Reference: Maddison, Tarlow, Minka (2014), arXiv:1411.0030 (Gumbel-max).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from assay.kernels.triton_chacha import keystream, words_of

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before this module is imported)."""

_BLOCKS = 128  # ChaCha blocks per program, one per thread: 2048 candidates
_LANES, _PROGRAMS = 32, 32  # survivors per step, and programs that share the survivors of one row


@triton.jit  # type: ignore[untyped-decorator]
def _log2(x, FAST: tl.constexpr):
    if FAST:
        # The hardware's logarithm: tl.log2 is a polynomial that costs more than the cipher. No argument is subnormal,
        # so flushing (ftz) changes nothing and saves the rescaling around it.
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit  # type: ignore[untyped-decorator]
def _score(word, value, FAST: tl.constexpr):
    """Logit - ln E with E the race time of the word; NaN becomes inf, because a maximum would pass over it."""
    r = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # Small r wins the race, and there 1 - r has lost its digits: a short series instead of the logarithm.
    series = r * (1.0 + r * (0.5 + r * (0.33333334 + r * (0.25 + r * 0.2))))
    time = tl.where(r < 0.015625, series, -0.6931472 * _log2(1.0 - r, FAST))
    score = value - 0.6931472 * _log2(time, FAST)
    return tl.where(score == score, score, float("inf"))


@triton.jit
def _best(score, candidate):
    """The largest score and the lowest candidate that has it."""
    top = tl.max(score, axis=0)
    return top, tl.min(tl.where(score == top, candidate, 0x7FFFFFFF), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def sampling_kernel(
    keys,
    logits,
    best_score,
    best_id,
    words,
    listed,
    counts,
    vocabulary,
    tiles,
    stride,
    BLOCKS: tl.constexpr,
    FAST: tl.constexpr,
    WORDS: tl.constexpr,
    TRUNCATED: tl.constexpr,
):
    """One tile of one row: the best of its candidates; with WORDS also the tile's PRF words.

    With TRUNCATED, a tile that has at most BLOCKS survivors is not raced: its survivors are listed in ascending order
    for `survivors_kernel`, which then needs no more blocks than the tile would have.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    candidate = (tile * BLOCKS + tl.arange(0, BLOCKS))[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = candidate < vocabulary
    at = logits + row * vocabulary + candidate
    flat = candidate.reshape(BLOCKS * 16)
    if TRUNCATED:
        left = (tl.load(at, mask=inside, other=-float("inf")) != -float("inf")).reshape(BLOCKS * 16).to(tl.int32)
        count = tl.sum(left, axis=0)
        few = count <= BLOCKS
        tl.store(counts + row * tiles + tile, tl.where(few, count, 0))
        if few:
            if count > 0:
                place = (row * tiles + tile) * BLOCKS + tl.cumsum(left, axis=0) - 1
                tl.store(listed + place, flat, mask=left != 0)
            tl.store(best_score + row * stride + tile, -float("inf"))
            tl.store(best_id + row * stride + tile, 0x7FFFFFFF)
            return
    x = keystream(keys + row * 8, tile * BLOCKS, BLOCKS)
    if WORDS:
        tl.store(words + row * vocabulary + candidate, x.to(tl.int32, bitcast=True), mask=inside)
    # Read after the cipher, which needs the registers.
    value = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
    top, first = _best(_score(x, value, FAST).reshape(BLOCKS * 16), flat)
    tl.store(best_score + row * stride + tile, top)
    tl.store(best_id + row * stride + tile, first)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of(counts, tiles, wanted, LANES: tl.constexpr):
    """Tile of the survivor that stands at `wanted` in a row's lists, and how many survivors the tiles before hold."""
    tile = tl.zeros((LANES,), tl.int32)
    before = tl.zeros((LANES,), tl.int32)
    seen = 0
    for start in range(0, tiles, 32):
        at = start + tl.arange(0, 32)
        count = tl.load(counts + at, mask=at < tiles, other=0)
        passed = (seen + tl.cumsum(count, axis=0))[None, :] <= wanted[:, None]
        tile += tl.sum(passed.to(tl.int32), axis=1)
        before += tl.sum(tl.where(passed, count[None, :], 0), axis=1)
        seen += tl.sum(count, axis=0)
    return tile, before


@triton.jit  # type: ignore[untyped-decorator]
def survivors_kernel(
    keys,
    logits,
    best_score,
    best_id,
    words,
    listed,
    counts,
    vocabulary,
    tiles,
    stride,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FAST: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The best of one row's listed survivors, LANES at a time, every PROGRAMS-th group of them."""
    row = tl.program_id(0).to(tl.int64)
    total = 0
    for start in range(0, tiles, 32):
        at = start + tl.arange(0, 32)
        total += tl.sum(tl.load(counts + row * tiles + at, mask=at < tiles, other=0), axis=0)
    best = tl.full((), -float("inf"), tl.float32)
    winner = tl.full((), 0x7FFFFFFF, tl.int32)
    for group in range(tl.program_id(1), tl.cdiv(total, LANES), PROGRAMS):
        wanted = group * LANES + tl.arange(0, LANES)
        inside = wanted < total
        tile, before = _tile_of(counts + row * tiles, tiles, wanted, LANES)
        candidate = tl.load(listed + (row * tiles + tile) * BLOCKS + wanted - before, mask=inside, other=0)
        value = tl.load(logits + row * vocabulary + candidate, mask=inside, other=-float("inf")).to(tl.float32)
        word = words_of(keys + row * 8, candidate, LANES)
        if WORDS:
            tl.store(words + row * vocabulary + candidate, word.to(tl.int32, bitcast=True), mask=inside)
        top, first = _best(_score(word, value, FAST), tl.where(inside, candidate, 0x7FFFFFFF))
        # Groups come in ascending order of ids, so that a later one with the same score does not win.
        winner = tl.where(top > best, first, winner)
        best = tl.maximum(top, best)
    tl.store(best_score + row * stride + tiles + tl.program_id(1), best)
    tl.store(best_id + row * stride + tiles + tl.program_id(1), winner)


def winners(
    keys: torch.Tensor, logits: torch.Tensor, *, truncated: bool = False, blocks: int = _BLOCKS
) -> torch.Tensor:
    """Winner of the keyed race of each row: argmax of logits - ln E, E the race times of the row's key.

    Distributed as softmax(logits) over keys. Ties go to the lowest id. No synchronisation with the device.

    Parameters
    ----------
    keys
        int32, shape (n, 8): from `triton_chacha.subkeys`.
    logits
        Floating, shape (n, V), contiguous, after temperature and truncation; -inf never wins.
    truncated
        Whether most candidates are expected to be -inf. PRF words are then computed for survivors only, in each tile of
        which at most a sixteenth survives; the other tiles are raced whole. Changes time only.
    blocks
        Keystream blocks per program, a power of two; changes time only.

    Returns
    -------
    int64, shape (n,); -1 for a row that cannot be drawn from: it holds NaN or +inf, or nothing but -inf.
    """
    return _run(keys, logits, None, truncated, blocks)


def winners_and_words(
    keys: torch.Tensor, logits: torch.Tensor, *, truncated: bool = False, blocks: int = _BLOCKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `winners`, with the words of the race: int32, shape (n, V), the bits of uint32, 0 where none was needed."""
    words = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    return _run(keys, logits, words, truncated, blocks), words


def _run(
    keys: torch.Tensor, logits: torch.Tensor, words: torch.Tensor | None, truncated: bool, blocks: int
) -> torch.Tensor:
    fits = logits.ndim == 2 and logits.shape[1] > 0 and logits.is_contiguous() and keys.shape == (len(logits), 8)
    if not fits or keys.dtype != torch.int32:
        raise ValueError(
            "logits must be contiguous with shape (n, V), V >= 1, and keys int32 with shape (n, 8), got "
            f"{tuple(logits.shape)} and {tuple(keys.shape)} {keys.dtype}."
        )
    rows, vocabulary = logits.shape
    if not rows:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    tiles = triton.cdiv(vocabulary, 16 * blocks)
    programs = min(_PROGRAMS, triton.cdiv(tiles * blocks, _LANES)) if truncated else 0
    stride = tiles + programs  # results per row: of the tiles, then of the programs that race the survivors

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    score, ids = empty(rows, stride, dtype=torch.float32), empty(rows, stride)
    listed, counts = (empty(rows, tiles, blocks), empty(rows, tiles)) if truncated else (ids, ids)
    common = (keys, logits, score, ids, ids if words is None else words, listed, counts, vocabulary, tiles, stride)
    settings = {"BLOCKS": blocks, "FAST": not INTERPRETED, "WORDS": words is not None}
    sampling_kernel[(rows, tiles)](*common, **settings, TRUNCATED=truncated, num_warps=4)
    if truncated:
        survivors_kernel[(rows, programs)](*common, **settings, LANES=_LANES, PROGRAMS=programs, num_warps=1)
    top = score.amax(1, keepdim=True)
    first = torch.where(score == top, ids, torch.iinfo(torch.int32).max).amin(1)
    return torch.where(torch.isfinite(top[:, 0]), first, -1).to(torch.int64)
