"""The running sums in eager torch operations, on any device: what `statistics_numba` does, where numba cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from assay.kernels.scoring.running import CROSS, MASS, MAXIMUM, MEAN, SECOND, THIRD, TILTED, RunningSums
from assay.kernels.scoring.statistics import Floats

if TYPE_CHECKING:
    import torch


def update(
    sums: RunningSums,
    rows: slice,
    logits: torch.Tensor,
    offset: int,
    other: torch.Tensor | None = None,
) -> None:
    """Add a block of logits to the running sums of `rows`, in place.

    Parameters
    ----------
    logits
        float32, shape (n, c) with n the number of `rows`; its first column is candidate `offset`.
    other
        float32, same shape: the second model's logits.
    """
    import torch

    device = logits.device
    chosen = torch.from_numpy(sums.chosen[rows]).to(device)[:, None]
    sums.greater[rows] += (logits > chosen).sum(1).cpu().numpy()
    sums.ties[rows] += (logits == chosen).sum(1).cpu().numpy()
    place = torch.from_numpy(sums.targets[rows] - offset).to(device)
    inside = ((place >= 0) & (place < logits.shape[1])).cpu().numpy()
    met = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    sums.seen[rows][inside] = met.cpu().numpy()[inside]

    # NaN must win over every number, which amax grants.
    old = torch.from_numpy(sums.state[rows, MAXIMUM].astype(np.float32)).to(device)
    top = torch.maximum(old, logits.amax(1))
    base = torch.where(top == -torch.inf, 0.0, top)
    deviation = (logits - base[:, None]).clamp_min(-1e30)
    weight = torch.exp(deviation)
    mass = weight.sum(1)
    mean = torch.where(mass > 0, (weight * deviation).sum(1) / mass, 0.0)
    around = deviation - mean[:, None]
    second = weight * around * around
    parts = [mass, mean, second.sum(1), (second * around).sum(1)]
    parts += [torch.exp(float(power) * deviation).sum(1) for power in sums.powers]
    highest = top.double().cpu().numpy()
    if other is not None:
        _add_other(sums, rows, weight, other, highest)
    _merge(sums.state[rows], highest, torch.stack(parts).double().cpu().numpy(), sums.powers)


def _merge(state: Floats, top: Floats, parts: Floats, powers: Floats) -> None:
    """Merge central moments (Pebay 2008, SAND2008-6212, section 2), rows side by side."""
    finite = np.where(top == -np.inf, 0.0, top)
    mass, mean, second, third = parts[0], parts[1] + finite, parts[2], parts[3]
    with np.errstate(invalid="ignore"):
        drop = np.where(state[:, MAXIMUM] == top, 0.0, state[:, MAXIMUM] - finite)
    for column in (MASS, SECOND, THIRD):
        state[:, column] *= np.exp(drop)
    state[:, TILTED:] *= np.exp(powers * drop[:, None])
    state[:, TILTED:] += parts[4:].T
    old = state[:, MASS].copy()
    total = old + mass
    divisor = np.where(total == 0, 1.0, total)
    delta = np.where((old == 0) | (mass == 0), 0.0, mean - state[:, MEAN])
    share = old * mass / divisor
    state[:, THIRD] += third + delta**3 * share * (old - mass) / divisor
    state[:, THIRD] += 3 * delta * (old * second - mass * state[:, SECOND]) / divisor
    state[:, SECOND] += second + delta**2 * share
    state[:, MEAN] = np.where(old == 0, mean, state[:, MEAN] + delta * mass / divisor)
    state[:, MASS] = total
    state[:, MAXIMUM] = top


def _add_other(sums: RunningSums, rows: slice, weight: torch.Tensor, other: torch.Tensor, top: Floats) -> None:
    """Add the second model's block: its own maximum and mass, and the cross term around a fixed centre."""
    import torch

    others, state = sums.others[rows], sums.state[rows]
    peak = other.amax(1).double().cpu().numpy()
    fresh = others[:, 0] == -np.inf
    others[fresh, 2] = np.where(peak[fresh] == -np.inf, 0.0, peak[fresh])
    new = np.maximum(others[:, 0], peak)
    base = np.where(new == -np.inf, 0.0, new)
    added = torch.exp(other - torch.from_numpy(base.astype(np.float32)).to(other.device)[:, None]).sum(1)
    others[:, 1] = others[:, 1] * np.exp(others[:, 0] - base) + added.double().cpu().numpy()
    others[:, 0] = new
    centre = torch.from_numpy(others[:, 2].astype(np.float32)).to(other.device)[:, None]
    crossed = torch.where(weight > 0, weight * (other - centre), 0.0).sum(1).double().cpu().numpy()
    with np.errstate(invalid="ignore"):
        scale = np.exp(np.where(state[:, MAXIMUM] == top, 0.0, state[:, MAXIMUM] - top))
        kept = np.where(scale > 0, state[:, CROSS] * scale, 0.0)
    state[:, CROSS] = kept + crossed
