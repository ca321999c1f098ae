"""One pass over whole rows of logits on the GPU: one program per row, every statistic in registers, no atomics.

A row's result depends on its logits and the block size alone. What the columns hold is explained in `running`.
Reference: Milakov and Gimelshein (2018), arXiv:1805.02867 (running maximum and sum).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from assay.kernels.scoring import running
from assay.kernels.scoring.running import CROSS, MASS, MAXIMUM, MEAN, SECOND, THIRD, TILTED
from assay.kernels.scoring.statistics import Floats, TokenStatistics

_BLOCK, _WARPS = 2048, 16  # four logits per thread: their thirteen sums take under a hundred registers
_COLUMNS = 19  # per row: maximum, centre, mass, three sums, seven tilted sums, second model's three, the two counts


@triton.jit  # type: ignore[untyped-decorator]
def statistics_kernel(
    logits,
    stride,
    targets,
    out,
    vocabulary,
    temperature,
    other,
    other_stride,
    BLOCK: tl.constexpr,
    CROSSED: tl.constexpr,
):
    """Sums of one row under weights e = exp(l - m): of e u^k with u = l - m + shift, and of e^(1 - s) at the tilts."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    beside = other + row * other_stride
    lane = tl.arange(0, BLOCK)
    # Counts compare the logits as given: a division could merge neighbours.
    chosen = tl.load(at + tl.load(targets + row)).to(tl.float32)
    x = tl.div_rn(tl.load(at + lane, mask=lane < vocabulary, other=-float("inf")).to(tl.float32), temperature)
    # Finite even if a whole block is -inf, which would make -inf - -inf.
    top = tl.maximum(tl.max(x, axis=0), -3.0e38)
    weight = tl.exp(x - top)
    deviation = tl.where(weight > 0, x - top, 0.0)
    # The centre of the moments lies this far below the largest logit: about where the mean is, so nothing cancels.
    shift = -tl.sum(weight * deviation, axis=0) / tl.maximum(tl.sum(weight, axis=0), 1e-30)
    zero = tl.zeros((BLOCK,), tl.float32)
    mass, first, second, third = zero, zero, zero, zero
    p16, p12, p10, p9, p7, p6, p4 = zero, zero, zero, zero, zero, zero, zero
    greater = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    peak = tl.full((), -3.0e38, tl.float32)
    q_mass, cross, centre = zero, zero, tl.full((), 0.0, tl.float32)
    if CROSSED:
        y = tl.load(beside + lane, mask=lane < vocabulary, other=-float("inf")).to(tl.float32)
        centre = tl.max(y, axis=0)
        centre = tl.where(centre > -3.0e38, centre, 0.0)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lane < vocabulary
        raw = tl.load(at + start + lane, mask=inside, other=-float("inf")).to(tl.float32)
        greater += (raw > chosen).to(tl.int32)
        equal += ((raw == chosen) & inside).to(tl.int32)
        x = tl.div_rn(raw, temperature)
        highest = tl.max(x, axis=0)
        if highest > top:
            # The old sums in terms of the new maximum. exp(-200) is 0, so a larger rise than 200 changes nothing.
            rise = tl.minimum(highest - top, 200.0)
            scale = tl.exp(-rise)
            third = scale * (third - 3.0 * rise * second + 3.0 * rise * rise * first - rise * rise * rise * mass)
            second = scale * (second - 2.0 * rise * first + rise * rise * mass)
            first = scale * (first - rise * mass)
            mass *= scale
            root = tl.exp(-0.125 * rise)
            root2 = root * root
            root4 = root2 * root2
            p16 *= scale * scale
            p12 *= scale * root4
            p10 *= scale * root2
            p9 *= scale * root
            p7 *= root4 * root2 * root
            p6 *= root4 * root2
            p4 *= root4
            if CROSSED:
                cross = tl.where(mass > 0, cross * scale, 0.0)
            top = highest
        d = x - top
        # A comparison, not a maximum, so that NaN stays.
        d = tl.where(d < -696.0, -696.0, d)
        q = tl.exp(0.125 * d)
        q2 = q * q
        q4 = q2 * q2
        e = q4 * q4
        u = d + shift
        eu = e * u
        mass += e
        first += eu
        second += eu * u
        third += eu * u * u
        p16 += e * e
        p12 += e * q4
        p10 += e * q2
        p9 += e * q
        p7 += q4 * q2 * q
        p6 += q4 * q2
        p4 += q4
        if CROSSED:
            y = tl.load(beside + start + lane, mask=inside, other=-float("inf")).to(tl.float32)
            tallest = tl.max(y, axis=0)
            if tallest > peak:
                q_mass *= tl.exp(peak - tallest)
                peak = tallest
            q_mass += tl.exp(y - peak)
            cross += tl.where(e > 0, e * (y - centre), 0.0)
    to = out + row * 19
    tl.store(to + 0, top)
    tl.store(to + 1, shift)
    tl.store(to + 2, tl.sum(mass, axis=0))
    tl.store(to + 3, tl.sum(first, axis=0))
    tl.store(to + 4, tl.sum(second, axis=0))
    tl.store(to + 5, tl.sum(third, axis=0))
    tl.store(to + 6, tl.sum(p16, axis=0))
    tl.store(to + 7, tl.sum(p12, axis=0))
    tl.store(to + 8, tl.sum(p10, axis=0))
    tl.store(to + 9, tl.sum(p9, axis=0))
    tl.store(to + 10, tl.sum(p7, axis=0))
    tl.store(to + 11, tl.sum(p6, axis=0))
    tl.store(to + 12, tl.sum(p4, axis=0))
    tl.store(to + 13, tl.sum(greater, axis=0).to(tl.float32))
    tl.store(to + 14, tl.sum(equal, axis=0).to(tl.float32))
    tl.store(to + 15, peak)
    tl.store(to + 16, tl.sum(q_mass, axis=0))
    tl.store(to + 17, centre)
    tl.store(to + 18, tl.sum(cross, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def tilted_kernel(logits, stride, tops, powers, out, vocabulary, temperature, count, BLOCK: tl.constexpr):
    """Sum of exp(power (l - m)) for one row and one power, for tilts other than the default ones."""
    row = tl.program_id(0).to(tl.int64)
    power = tl.load(powers + tl.program_id(1))
    top = tl.load(tops + row)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        raw = tl.load(logits + row * stride + start + lane, mask=start + lane < vocabulary, other=-float("inf"))
        total += tl.exp(power * (tl.div_rn(raw.to(tl.float32), temperature) - top))
    tl.store(out + row * count + tl.program_id(1), tl.sum(total, axis=0))


def row_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    tilts: Floats,
    other: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    block: int = _BLOCK,
    numbers: npt.NDArray[np.int64] | None = None,
) -> TokenStatistics:
    """Statistics of whole rows, as `tokens.score_logits` describes them.

    Parameters
    ----------
    logits
        float32, bfloat16 or float16, shape (n, V), after truncation; rows contiguous.
    targets
        int64, shape (n,), checked.
    tilts
        float64, shape (t,), checked.
    other
        As `logits`: the second model's.
    temperature
        Logits are divided by it.
    block
        Logits per step, a power of two.
    numbers
        What errors call the rows; None counts from 0.
    """
    n, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    beside = logits if other is None else (other if other.stride(1) == 1 else other.contiguous())
    targets = targets.to(logits.device, torch.int64)
    out = torch.empty((n, _COLUMNS), dtype=torch.float32, device=logits.device)
    if n:
        statistics_kernel[(n,)](
            logits,
            logits.stride(0),
            targets,
            out,
            vocabulary,
            float(temperature),
            beside,
            beside.stride(0),
            BLOCK=block,
            CROSSED=other is not None,
            num_warps=_WARPS,
        )
    chosen = logits.gather(1, targets[:, None])[:, 0].float() / temperature
    sums = running.start(targets.cpu().numpy(), chosen.cpu().numpy(), tilts)
    tilted = (
        out[:, 6:13] if sums.default_tilts else _tilted(logits, out[:, 0].contiguous(), sums.powers, temperature, block)
    )
    _fill(sums, out.double().cpu().numpy(), tilted.double().cpu().numpy())
    return running.finish(sums, tilts, cross=other is not None, numbers=numbers)


def _tilted(logits: torch.Tensor, tops: torch.Tensor, powers: Floats, temperature: float, block: int) -> torch.Tensor:
    n, vocabulary = logits.shape
    out = torch.empty((n, len(powers)), dtype=torch.float32, device=logits.device)
    if out.numel():
        on_device = torch.from_numpy(powers.astype(np.float32)).to(logits.device)
        tilted_kernel[(n, len(powers))](
            logits,
            logits.stride(0),
            tops,
            on_device,
            out,
            vocabulary,
            float(temperature),
            len(powers),
            BLOCK=block,
            num_warps=_WARPS,
        )
    return out


def _fill(sums: running.RunningSums, found: Floats, tilted: Floats) -> None:
    """The kernel's columns as running sums: raw sums about the shifted maximum become central ones."""
    top, shift, mass, first, second, third = found[:, :6].T
    mean = np.divide(first, mass, out=np.zeros_like(mass), where=mass > 0)
    # -3e38 stands for "nothing but -inf".
    sums.state[:, MAXIMUM] = np.where(top <= -3.0e38, -np.inf, top)
    sums.state[:, MASS] = mass
    sums.state[:, MEAN] = top - shift + mean
    sums.state[:, SECOND] = second - mass * mean**2
    sums.state[:, THIRD] = third - 3 * mean * second + 2 * mass * mean**3
    sums.state[:, CROSS] = found[:, 18]
    sums.state[:, TILTED:] = tilted
    sums.greater[:], sums.ties[:] = found[:, 13], found[:, 14]
    sums.others[:, 0] = np.where(found[:, 15] <= -3.0e38, -np.inf, found[:, 15])
    sums.others[:, 1:] = found[:, 16:18]
