"""XChaCha20 in Triton: the words of `chacha`, bit for bit.

Words are uint32 in kernels; tensors carry them as int32, because torch lacks arithmetic on uint32.
Reference: RFC 8439, section 2.3; draft-irtf-cfrg-xchacha-03, section 2.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from assay.kernels.chacha import Words, context_groups


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
def keystream(key, first, BLOCKS: tl.constexpr):
    """Words of blocks first .. first + BLOCKS - 1 of one key, as uint32 (BLOCKS, 16)."""
    counter = (first + tl.arange(0, BLOCKS)).to(tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _block(key, counter, BLOCKS)
    # Joined so that the sixteen words of a block lie side by side: 64 contiguous bytes of logits per thread.
    a = tl.join(tl.join(tl.join(x0, x8), tl.join(x4, x12)), tl.join(tl.join(x2, x10), tl.join(x6, x14)))
    b = tl.join(tl.join(tl.join(x1, x9), tl.join(x5, x13)), tl.join(tl.join(x3, x11), tl.join(x7, x15)))
    return tl.join(a, b).reshape(BLOCKS, 16)


@triton.jit  # type: ignore[untyped-decorator]
def words_of(key, candidate, LANES: tl.constexpr):
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
