"""Running noise of the counters, step by step in compiled loops; `streams` holds their state and draws their noise.

Every loop stops early where the drawn noise might not last one more step, and says how many steps and draws it used.
"""

from __future__ import annotations

import numpy as np

from assay._compiled import compiled

_jit = compiled()


@_jit
def plain(state, pool, out):
    """Fresh noise on every step; state = (total,)."""
    steps = min(len(out), len(pool))
    for i in range(steps):
        state[0] += pool[i]
        out[i] = state[0]
    return steps, steps


@_jit
def binary(state, pool, out):
    """State = (time, total, one node per level). Step t ends the node at the level of its lowest one-bit."""
    nodes = state[2:]
    steps = min(len(out), len(pool))
    for i in range(steps):
        state[0] += 1
        level = 0
        while not state[0] >> level & 1:
            state[1] -= nodes[level]
            nodes[level] = 0
            level += 1
        nodes[level] = pool[i]
        state[1] += pool[i]
        out[i] = state[1]
    return steps, steps


@_jit
def kary(state, half, pool, out):
    """State = (total, then per level: digit, sum, the `half` nodes that may still be subtracted)."""
    width = half + 2
    levels = (len(state) - 1) // width
    used = 0
    for i in range(len(out)):
        if len(pool) - used < levels * half + 1:
            return i, used
        level = 0
        while True:
            base = 1 + level * width
            state[base] += 1
            if state[base] <= half:
                break
            # A new parent: its nodes to the left are subtracted first, and given back one by one.
            state[base] = -half
            total = 0
            for j in range(half):
                state[base + 2 + j] = pool[used]
                total -= pool[used]
                used += 1
            state[0] += total - state[base + 1]
            state[base + 1] = total
            level += 1
        digit = state[base]
        if digit <= 0:
            change = state[base + 2 - digit]
        else:
            change = pool[used]
            used += 1
        state[base + 1] += change
        state[0] += change
        out[i] = state[0]
    return len(out), used


@_jit
def smooth(state, pool, out):
    """State = (leaf, total, one node per level). The next leaf is the next number with as many ones."""
    nodes = state[2:]
    used = 0
    for i in range(len(out)):
        if len(pool) - used < len(nodes):
            return i, used
        leaf = state[0]
        lowest = leaf & -leaf
        ripple = leaf + lowest
        following = ripple | ((leaf ^ ripple) >> 2) // lowest
        changed = leaf ^ following
        level = 0
        while changed >> level:
            state[1] -= nodes[level]
            nodes[level] = 0
            if following >> level & 1:
                nodes[level] = pool[used]
                state[1] += pool[used]
                used += 1
            level += 1
        state[0] = following
        out[i] = state[1]
    return len(out), used


@_jit
def honaker(state, sums, estimates, variances, values, pool, out):
    """State = (time,). Sums and best estimates of the open left nodes, per level; releases from noisy sums alone."""
    used = 0
    for i in range(len(out)):
        if len(pool) - used < len(sums):
            return i, used
        state[0] += 1
        total = values[i]
        estimate = np.float64(total + pool[used])
        used += 1
        level = 0
        while not state[0] >> level & 1:
            total += sums[level]
            children = estimate + estimates[level]
            share = 2 * variances[level] / (1 + 2 * variances[level])
            estimate = share * (total + pool[used]) + (1 - share) * children
            used += 1
            estimates[level] = 0.0
            level += 1
        sums[level] = total
        estimates[level] = estimate
        answer = 0.0
        for j in range(len(estimates)):
            answer += estimates[j]
        out[i] = np.int64(np.rint(answer))
    return len(out), used


@_jit
def filtered(memory, rates, weights, unit, pool, out):
    """Noise of a BLT: each buffer decays and takes in the draw; the release is their weighted sum, rounded."""
    steps = min(len(out), len(pool))
    for i in range(steps):
        draw = pool[i] * unit
        total = 0.0
        for j in range(len(memory)):
            memory[j] = rates[j] * memory[j] + draw
            total += weights[j] * memory[j]
        out[i] = np.int64(np.rint(total))
    return steps, steps
