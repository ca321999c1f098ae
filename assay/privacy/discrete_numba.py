"""The sampler of `discrete` in machine integers: the same words in, the same samples out.

Every product is checked before it is formed. A sample that would need more than 64 bits stops the loop with `BIG`, and
the caller draws that one sample, from the same words, with Python's integers.
"""

from __future__ import annotations

import numpy as np

from assay._compiled import compiled

DONE, WORDS, BIG = 0, 1, 2

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_TWO = np.uint64(2)
_TOP = np.uint64(2**64 - 1)
_ROOT = np.uint64(2**32 - 1)

_jit = compiled()


@_jit
def below(words, state, n):
    """Uniform on 0 .. n - 1 from 64-bit words; words in the first, incomplete class are passed over."""
    if n == _ONE:
        return _ZERO
    excess = (_TOP - n + _ONE) % n  # 2**64 mod n
    while state[0] < len(words):
        word = words[state[0]]
        state[0] += 1
        if word >= excess:
            return word % n
    state[1] = WORDS
    return _ZERO


@_jit
def bernoulli_exp(words, state, num, den):
    """True with probability exp(-num / den)."""
    k = _ONE
    while True:
        if den > _TOP // k:
            state[1] = BIG
            return False
        if below(words, state, den * k) >= num or state[1] != DONE:
            return k % _TWO == _ONE
        k += _ONE


@_jit
def laplace_magnitude(words, state, num):
    """(u, v): u + num * v is the magnitude before the division by the denominator."""
    while state[1] == DONE:
        u = below(words, state, num)
        if not bernoulli_exp(words, state, u, num) or state[1] != DONE:
            continue
        v = _ZERO
        while bernoulli_exp(words, state, _ONE, _ONE) and state[1] == DONE:
            v += _ONE
        return u, v
    return _ZERO, _ZERO


@_jit
def laplace(words, state, num, den):
    """One draw of scale num / den."""
    while state[1] == DONE:
        u, v = laplace_magnitude(words, state, num)
        if v >= np.uint64(2**12):  # num * v must stay below 2**63; MAX_SCALE leaves 12 bits
            state[1] = BIG
            return np.int64(0)
        y = np.int64((u + num * v) // den)
        if below(words, state, _TWO) == _ZERO:
            return y
        if y != 0:
            return -y
    return np.int64(0)


@_jit
def all_exp_minus_one(words, state, times):
    """True with probability exp(-times)."""
    for _ in range(times):  # noqa: SIM110  # numba has no all() over a generator
        if not bernoulli_exp(words, state, _ONE, _ONE) or state[1] != DONE:
            return False
    return True


@_jit
def gaussian(words, state, num, den, t):
    """One draw of variance parameter num / den, by way of a Laplace draw of scale t."""
    scaled = np.uint64(2) * num * den * t * t  # the caller checks that it fits
    while state[1] == DONE:
        y = laplace(words, state, t, _ONE)
        size = np.uint64(abs(y))
        if size != _ZERO and t * den > _TOP // size:
            state[1] = BIG
            return np.int64(0)
        product = size * t * den
        gap = product - num if product >= num else num - product
        if gap > _ROOT:
            state[1] = BIG
            return np.int64(0)
        square = gap * gap
        if all_exp_minus_one(words, state, square // scaled) and bernoulli_exp(words, state, square % scaled, scaled):
            return y
    return np.int64(0)


@_jit
def exp_half_square(words, state, a, b):
    """True with probability exp(-(a / b)**2 / 2)."""
    k = _ONE
    while (
        below(words, state, b) < a
        and below(words, state, b) < a
        and below(words, state, _TWO * k) == _ZERO
        and state[1] == DONE
    ):
        k += _ONE
    return k % _TWO == _ONE


@_jit
def gaussian_of_sigma(words, state, sigma):
    """One draw of integer standard deviation parameter."""
    while state[1] == DONE:
        u, v = laplace_magnitude(words, state, sigma)
        negative = below(words, state, _TWO) == _ONE
        if v >= np.uint64(2**12):
            state[1] = BIG
            return np.int64(0)
        if negative and u == _ZERO and v == _ZERO:
            continue
        kept = True
        if v > _ONE:
            for _ in range((v - _ONE) * (v - _ONE)):
                if not bernoulli_exp(words, state, _ONE, _TWO) or state[1] != DONE:
                    kept = False
                    break
            if kept:
                for _ in range(v - _ONE):
                    if not bernoulli_exp(words, state, u, sigma) or state[1] != DONE:
                        kept = False
                        break
        if kept and exp_half_square(words, state, u if v > _ZERO else sigma - u, sigma):
            y = np.int64(u + sigma * v)
            return -y if negative else y
    return np.int64(0)


@_jit
def fill(kind, words, out, num, den, t):
    """Fill `out` from `words`; kind 0 is Laplace, 1 Gaussian, 2 Gaussian of integer sigma (in `num`).

    Returns (samples made, words used by them, why it stopped). The words of an unfinished sample are not counted as
    used: they come first in the next call, because to drop them would favour samples that need few words.
    """
    state = np.zeros(2, dtype=np.int64)
    used = 0
    for i in range(len(out)):
        if kind == 0:
            y = laplace(words, state, num, den)
        elif kind == 1:
            y = gaussian(words, state, num, den, t)
        else:
            y = gaussian_of_sigma(words, state, num)
        if state[1] != DONE:
            return i, used, state[1]
        out[i] = y
        used = state[0]
    return len(out), used, np.int64(DONE)
