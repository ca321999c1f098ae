"""The running noise of one counter: a state of plain arrays, and a step forward.

A state is a dict of arrays; it holds noise that was drawn and not yet used up, so it is as secret as the data. Noise is
drawn once per node: what `advance` returned is never drawn again from the same state.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assay.privacy.continual import trees
from assay.privacy.continual.plan import Plan
from assay.privacy.continual.toeplitz import Banded, BufferedLinear, SquareRoot, blt_noise
from assay.privacy.noise import Integers, NoiseSource

# The widest floats of the machine: where they are no wider than doubles, `Plan.numerical_delta` is larger.
_Wide = np.longdouble

State = dict[str, npt.NDArray[np.generic]]

_CHUNK = 2**16
# Draws that wait in memory between calls; they are not part of a saved state, since unused draws owe nothing.
POOL = "pool"


def start(plan: Plan, noise: NoiseSource) -> State:
    """The state before the first step; Toeplitz designs draw all their noise here."""
    design = plan.design
    if isinstance(design, SquareRoot | Banded):
        return {"noise": toeplitz_noise(plan, noise)}
    if isinstance(design, trees.Plain):
        return {"integers": np.zeros(1, dtype=np.int64)}
    if isinstance(design, trees.BinaryTree):
        return {"integers": np.zeros(2 + design.levels, dtype=np.int64)}
    if isinstance(design, trees.KaryTree):
        return {"integers": np.zeros(1 + design.levels * ((design.arity - 1) // 2 + 2), dtype=np.int64)}
    if isinstance(design, trees.SmoothTree):
        first = np.zeros(2 + design.height, dtype=np.int64)
        first[0] = 2 ** (design.height // 2) - 1
        return {"integers": first}
    if isinstance(design, trees.Honaker):
        levels = design.levels
        return {
            "integers": np.zeros(1, dtype=np.int64),
            "sums": np.zeros(levels, dtype=np.int64),
            "estimates": np.zeros(levels),
        }
    if isinstance(design, BufferedLinear):
        return {"buffers": np.zeros(len(design.poles) + 1)}
    raise TypeError(f"design must be one of this package's, got {type(design).__name__}.")


def toeplitz_noise(plan: Plan, noise: NoiseSource) -> Integers:
    """L z rounded to integers for all times."""
    found: Integers = np.rint(mixed_noise(plan, noise)).astype(np.int64)
    return found


def mixed_noise(plan: Plan, noise: NoiseSource) -> npt.NDArray[np.longdouble]:
    """L z for all times, by one convolution."""
    from scipy.fft import irfft, next_fast_len, rfft

    assert isinstance(plan.design, SquareRoot | Banded)  # noqa: S101  # for the type checker
    draws = np.asarray(noise.gaussian(plan.node, plan.design.horizon)).astype(_Wide) * _Wide(2.0**-plan.grid_bits)
    size = next_fast_len(2 * plan.design.horizon, real=True)
    weights = plan.design.noise_filter().astype(_Wide)
    mixed: npt.NDArray[np.longdouble] = irfft(rfft(draws, size) * rfft(weights, size), size)
    return mixed[: plan.design.horizon]


def advance(plan: Plan, state: State, time: int, values: Integers, total: int, noise: NoiseSource) -> Integers:
    """Releases for the next steps.

    Parameters
    ----------
    plan
        The plan that `state` was started with.
    state
        Changed in place.
    time, total
        Steps taken so far, and their exact sum.
    values
        int64, shape (n,): the next steps.
    noise
        Where fresh noise comes from.

    Returns
    -------
    int64, shape (n,): noisy prefix sums.
    """
    out = np.empty(len(values), dtype=np.int64)
    if isinstance(plan.design, SquareRoot | Banded):
        out[:] = state["noise"][time : time + len(values)]
    else:
        done = 0
        while done < len(out):
            pool = _pool(plan, state, len(out) - done, noise)
            steps, used = _run(plan, state, values[done:], pool, out[done:])
            state[POOL] = pool[used:]
            done += steps
    if isinstance(plan.design, trees.Honaker):
        return out  # its releases are functions of noisy node sums, and already hold the data
    out += total + np.cumsum(values)
    return out


def _run(plan: Plan, state: State, values: Integers, pool: Integers, out: Integers) -> tuple[int, int]:
    from assay.privacy.continual import steps_numba as compiled

    design = plan.design
    if isinstance(design, trees.Plain):
        steps, used = compiled.plain(state["integers"], pool, out)
    elif isinstance(design, trees.BinaryTree):
        steps, used = compiled.binary(state["integers"], pool, out)
    elif isinstance(design, trees.KaryTree):
        steps, used = compiled.kary(state["integers"], (design.arity - 1) // 2, pool, out)
    elif isinstance(design, trees.SmoothTree):
        steps, used = compiled.smooth(state["integers"], pool, out)
    elif isinstance(design, trees.Honaker):
        weights = trees.node_variances(design.levels)
        steps, used = compiled.honaker(state["integers"], state["sums"], state["estimates"], weights, values, pool, out)
    else:
        assert isinstance(design, BufferedLinear)  # noqa: S101  # for the type checker
        rates, weights = blt_noise(np.array(design.poles), np.array(design.zeros))
        steps, used = compiled.filtered(state["buffers"], rates, weights, 2.0**-plan.grid_bits, pool, out)
    return int(steps), int(used)


def _pool(plan: Plan, state: State, steps: int, noise: NoiseSource) -> Integers:
    """Draws for the next steps: what is left over, and enough new ones for at least one step of any tree."""
    left = state.get(POOL, np.empty(0, dtype=np.int64))
    worst = plan.design.memory + 64
    if len(left) >= worst + min(steps, _CHUNK):
        return np.asarray(left, dtype=np.int64)
    count = worst + min(steps + steps // 8, _CHUNK) + 256
    fresh = noise.laplace(plan.node, count) if plan.law == "laplace" else noise.gaussian(plan.node, count)
    return np.concatenate([np.asarray(left, dtype=np.int64), np.asarray(fresh)])
