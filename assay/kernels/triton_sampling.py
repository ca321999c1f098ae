"""Keyed Gumbel-max sampling fused into one Triton kernel: XChaCha20 words, Gumbel noise and argmax over the logits.

The words are those of `chacha`, bit for bit; logarithms are the card's, so that ids may differ from the CPU's where two
candidates' scores lie within about 1e-5 of each other. Detection uses the words alone.
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
    for g in range(depth):
        at = groups + (tl.minimum(row, rows - 1) * depth + g) * 4
        k0, k1, k2, k3, _0, _1, _2, _3, _4, _5, _6, _7, k4, k5, k6, k7 = _permute(
            zero + 0x61707865,
            zero + 0x3320646E,
            zero + 0x79622D32,
            zero + 0x6B206574,
            k0,
            k1,
            k2,
            k3,
            k4,
            k5,
            k6,
            k7,
            _word(at),
            _word(at + 1),
            _word(at + 2),
            _word(at + 3),
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
def _keystream(key, first, BLOCKS: tl.constexpr):
    """Words of blocks first .. first + BLOCKS - 1 of one key, nonce zero, as uint32 (BLOCKS, 16)."""
    zero = tl.zeros((BLOCKS,), tl.uint32)
    counter = (first + tl.arange(0, BLOCKS)).to(tl.uint32)
    k0 = _word(key + 0)
    k1 = _word(key + 1)
    k2 = _word(key + 2)
    k3 = _word(key + 3)
    k4 = _word(key + 4)
    k5 = _word(key + 5)
    k6 = _word(key + 6)
    k7 = _word(key + 7)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _permute(
        zero + 0x61707865,
        zero + 0x3320646E,
        zero + 0x79622D32,
        zero + 0x6B206574,
        zero + k0,
        zero + k1,
        zero + k2,
        zero + k3,
        zero + k4,
        zero + k5,
        zero + k6,
        zero + k7,
        counter,
        zero,
        zero,
        zero,
    )
    x0 += 0x61707865
    x1 += 0x3320646E
    x2 += 0x79622D32
    x3 += 0x6B206574
    # Joined so that the sixteen words of a block lie side by side: 64 contiguous bytes of logits per thread.
    a = tl.join(
        tl.join(tl.join(x0, x8 + k4), tl.join(x4 + k0, x12 + counter)),
        tl.join(tl.join(x2, x10 + k6), tl.join(x6 + k2, x14)),
    )
    b = tl.join(
        tl.join(tl.join(x1, x9 + k5), tl.join(x5 + k1, x13)), tl.join(tl.join(x3, x11 + k7), tl.join(x7 + k3, x15))
    )
    return tl.join(a, b).reshape(BLOCKS, 16)


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
def sampling_kernel(
    keys,
    logits,
    best_score,
    best_id,
    words,
    vocabulary,
    tiles,
    BLOCKS: tl.constexpr,
    FAST: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One tile of one row: the best of its candidates, score logits - ln E; with WORDS also the tile's PRF words."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    x = _keystream(keys + row * 8, tile * BLOCKS, BLOCKS)
    candidate = (tile * BLOCKS + tl.arange(0, BLOCKS))[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = candidate < vocabulary
    if WORDS:
        tl.store(words + row * vocabulary + candidate, x.to(tl.int32, bitcast=True), mask=inside)
    r = tl.minimum((x.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # Small r wins the race, and there 1 - r has lost its digits: a short series instead of the logarithm.
    series = r * (1.0 + r * (0.5 + r * (0.33333334 + r * (0.25 + r * 0.2))))
    time = tl.where(r < 0.015625, series, -0.6931472 * _log2(1.0 - r, FAST))
    value = tl.load(logits + row * vocabulary + candidate, mask=inside, other=-float("inf")).to(tl.float32)
    score = value - 0.6931472 * _log2(time, FAST)
    flat = score.reshape(BLOCKS * 16)
    top = tl.max(flat, axis=0)
    # Ties go to the lowest id.
    first = tl.min(tl.where(flat == top, candidate.reshape(BLOCKS * 16), 0x7FFFFFFF), axis=0)
    tl.store(best_score + row * tiles + tile, top)
    tl.store(best_id + row * tiles + tile, first)


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


def winners(keys: torch.Tensor, logits: torch.Tensor, *, blocks: int = _BLOCKS) -> torch.Tensor:
    """Winner of the keyed race of each row: argmax of logits - ln E, E the race times of the row's key.

    Distributed as softmax(logits) over keys. Ties go to the lowest id.

    Parameters
    ----------
    keys
        int32, shape (n, 8): from `subkeys`.
    logits
        Floating, shape (n, V), contiguous, after temperature and truncation; -inf never wins. At least one per row is
        finite.
    blocks
        Keystream blocks per program, a power of two; changes time only.

    Returns
    -------
    int64, shape (n,).
    """
    _, found = _run(keys, logits, blocks, words=False)
    return found


def winners_and_words(
    keys: torch.Tensor, logits: torch.Tensor, *, blocks: int = _BLOCKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `winners`, with the PRF words the race used: int32, shape (n, V), the bits of uint32. For checks."""
    words, found = _run(keys, logits, blocks, words=True)
    return found, words


def _run(keys: torch.Tensor, logits: torch.Tensor, blocks: int, *, words: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.ndim != 2 or not logits.is_contiguous() or keys.shape != (len(logits), 8) or keys.dtype != torch.int32:
        raise ValueError(
            "logits must be contiguous with shape (n, V) and keys int32 with shape (n, 8), got "
            f"{tuple(logits.shape)} and {tuple(keys.shape)} {keys.dtype}."
        )
    rows, vocabulary = logits.shape
    tiles = triton.cdiv(vocabulary, 16 * blocks)
    score = torch.empty((rows, tiles), dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, tiles), dtype=torch.int32, device=logits.device)
    out = torch.empty((rows, vocabulary) if words else (1, 1), dtype=torch.int32, device=logits.device)
    if rows:
        sampling_kernel[(rows, tiles)](
            keys,
            logits,
            score,
            ids,
            out,
            vocabulary,
            tiles,
            BLOCKS=blocks,
            FAST=not INTERPRETED,
            WORDS=words,
            num_warps=4,
        )
    # Tiles are in ascending order of ids, and argmax over equal maxima is made to take the first.
    top = score.amax(1, keepdim=True) if rows else score
    first = torch.where(score == top, ids, torch.iinfo(torch.int32).max).amin(1) if rows else ids[:, 0]
    return out, first.to(torch.int64)
