"""Keyed Gumbel-max sampling fused into one Triton kernel: XChaCha20 words, Gumbel noise and argmax over the logits.

The words are those of `chacha`, bit for bit; logarithms are the card's, so that ids may differ from the CPU's where two
candidates' scores lie within about 1e-5 of each other. Detection uses the words alone. After top-k, top-p or min-p the
cipher runs for the survivors only, one block each, in every tile that has few enough of them.
Reference: RFC 8439, section 2.3; draft-irtf-cfrg-xchacha-03, section 2.2; Maddison, Tarlow, Minka (2014),
arXiv:1411.0030 (Gumbel-max).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from assay.kernels.chacha import Words, context_groups

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before this module is imported)."""

_BLOCKS = 128  # ChaCha blocks per program, one per thread: 2048 candidates
_LANES, _PROGRAMS = 32, 32  # survivors per step, and programs that share the survivors of one row


@triton.jit
def _quarter(a, b, c, d):
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _double_round(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
    x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
    x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
    x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
    x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
    x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
    x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
    x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _permute(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    for _ in tl.static_range(10):
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _double_round(
            x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15
        )
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _word(pointer):
    # Tensors carry words as int32, because torch lacks arithmetic on uint32; the bits are the same.
    return tl.load(pointer).to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def subkeys_kernel(use_key, groups, out, rows, depth, BLOCK: tl.constexpr):
    """HChaCha20 cascade over each row's context groups, one row per lane: int32 (rows, depth, 4) to int32 (rows, 8)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    zero = tl.zeros((BLOCK,), tl.uint32)
    k0 = zero + _word(use_key + 0)
    k1 = zero + _word(use_key + 1)
    k2 = zero + _word(use_key + 2)
    k3 = zero + _word(use_key + 3)
    k4 = zero + _word(use_key + 4)
    k5 = zero + _word(use_key + 5)
    k6 = zero + _word(use_key + 6)
    k7 = zero + _word(use_key + 7)
    s0, s1, s2, s3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    for g in range(depth):
        at = groups + (tl.minimum(row, rows - 1) * depth + g) * 4
        g0, g1, g2, g3 = _word(at), _word(at + 1), _word(at + 2), _word(at + 3)
        k0, k1, k2, k3, _0, _1, _2, _3, _4, _5, _6, _7, k4, k5, k6, k7 = _permute(
            s0, s1, s2, s3, k0, k1, k2, k3, k4, k5, k6, k7, g0, g1, g2, g3
        )
    at = out + row * 8
    tl.store(at + 0, k0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(at + 1, k1.to(tl.int32, bitcast=True), mask=inside)
    tl.store(at + 2, k2.to(tl.int32, bitcast=True), mask=inside)
    tl.store(at + 3, k3.to(tl.int32, bitcast=True), mask=inside)
    tl.store(at + 4, k4.to(tl.int32, bitcast=True), mask=inside)
    tl.store(at + 5, k5.to(tl.int32, bitcast=True), mask=inside)
    tl.store(at + 6, k6.to(tl.int32, bitcast=True), mask=inside)
    tl.store(at + 7, k7.to(tl.int32, bitcast=True), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _block(key, counter, LANES: tl.constexpr):
    """The sixteen words of one keystream block per lane, nonce zero."""
    zero = tl.zeros((LANES,), tl.uint32)
    s0, s1, s2, s3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    k0, k1, k2, k3 = zero + _word(key), zero + _word(key + 1), zero + _word(key + 2), zero + _word(key + 3)
    k4, k5, k6, k7 = zero + _word(key + 4), zero + _word(key + 5), zero + _word(key + 6), zero + _word(key + 7)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _permute(
        s0, s1, s2, s3, k0, k1, k2, k3, k4, k5, k6, k7, counter, zero, zero, zero
    )
    x0, x1, x2, x3, x4, x5, x6, x7 = x0 + s0, x1 + s1, x2 + s2, x3 + s3, x4 + k0, x5 + k1, x6 + k2, x7 + k3
    x8, x9, x10, x11, x12 = x8 + k4, x9 + k5, x10 + k6, x11 + k7, x12 + counter
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit  # type: ignore[untyped-decorator]
def _keystream(key, first, BLOCKS: tl.constexpr):
    """Words of blocks first .. first + BLOCKS - 1 of one key, as uint32 (BLOCKS, 16)."""
    counter = (first + tl.arange(0, BLOCKS)).to(tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _block(key, counter, BLOCKS)
    # Joined so that the sixteen words of a block lie side by side: 64 contiguous bytes of logits per thread.
    a = tl.join(tl.join(tl.join(x0, x8), tl.join(x4, x12)), tl.join(tl.join(x2, x10), tl.join(x6, x14)))
    b = tl.join(tl.join(tl.join(x1, x9), tl.join(x5, x13)), tl.join(tl.join(x3, x11), tl.join(x7, x15)))
    return tl.join(a, b).reshape(BLOCKS, 16)


@triton.jit  # type: ignore[untyped-decorator]
def _words_of(key, candidate, LANES: tl.constexpr):
    """Word `candidate` of one key's keystream, one candidate per lane: a block each, of which one word is kept."""
    counter = (candidate >> 4).to(tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _block(key, counter, LANES)
    odd = (candidate & 1) != 0
    x0, x2, x4, x6 = tl.where(odd, x1, x0), tl.where(odd, x3, x2), tl.where(odd, x5, x4), tl.where(odd, x7, x6)
    x8, x10, x12, x14 = (
        tl.where(odd, x9, x8),
        tl.where(odd, x11, x10),
        tl.where(odd, x13, x12),
        tl.where(odd, x15, x14),
    )
    two, four, eight = (candidate & 2) != 0, (candidate & 4) != 0, (candidate & 8) != 0
    x0, x4, x8, x12 = tl.where(two, x2, x0), tl.where(two, x6, x4), tl.where(two, x10, x8), tl.where(two, x14, x12)
    x0, x8 = tl.where(four, x4, x0), tl.where(four, x12, x8)
    return tl.where(eight, x8, x0)


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
    x = _keystream(keys + row * 8, tile * BLOCKS, BLOCKS)
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
        word = _words_of(keys + row * 8, candidate, LANES)
        if WORDS:
            tl.store(words + row * vocabulary + candidate, word.to(tl.int32, bitcast=True), mask=inside)
        top, first = _best(_score(word, value, FAST), tl.where(inside, candidate, 0x7FFFFFFF))
        # Groups come in ascending order of ids, so that a later one with the same score does not win.
        winner = tl.where(top > best, first, winner)
        best = tl.maximum(top, best)
    tl.store(best_score + row * stride + tiles + tl.program_id(1), best)
    tl.store(best_id + row * stride + tiles + tl.program_id(1), winner)


def subkeys(use_key: Words, contexts: Words, device: torch.device | str) -> torch.Tensor:
    """One key per context, as `chacha.subkeys`, computed on the device.

    Parameters
    ----------
    use_key
        uint32, shape (8,).
    contexts
        uint32, shape (n, h), oldest token first.

    Returns
    -------
    int32, shape (n, 8), on `device`: the bits of the uint32 words.
    """
    groups = torch.from_numpy(context_groups(contexts).view("int32").copy()).to(device)
    key = torch.from_numpy(use_key.view("int32").copy()).to(device)
    out = torch.empty((len(contexts), 8), dtype=torch.int32, device=device)
    if len(contexts):
        grid = (triton.cdiv(len(contexts), 32),)
        subkeys_kernel[grid](key, groups, out, len(contexts), groups.shape[1], BLOCK=32, num_warps=1)
    return out


def winners(
    keys: torch.Tensor, logits: torch.Tensor, *, truncated: bool = False, blocks: int = _BLOCKS
) -> torch.Tensor:
    """Winner of the keyed race of each row: argmax of logits - ln E, E the race times of the row's key.

    Distributed as softmax(logits) over keys. Ties go to the lowest id. No synchronisation with the device.

    Parameters
    ----------
    keys
        int32, shape (n, 8): from `subkeys`.
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
