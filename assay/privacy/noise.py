"""Where the noise of a release comes from: one interface of two methods, three sources.

Guarantee: draws are exact samples of the discrete Laplace or Gaussian law (see `discrete`), so that integer data with
integer sensitivity keeps its proof to the last bit; `opendp` draws may have a scale larger by one part in 2**52.
Sources: `exact` (own sampler, entropy of the operating system), `opendp`, and `SeededNoise`, which hides nothing.

Not promised: constant time. Rejection samplers, OpenDP's included, take longer for some values than for others; do not
let the people whom the noise protects against time the release.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from assay._errors import MissingDependencyError
from assay.privacy import discrete
from assay.privacy.errors import SeededNoiseError

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Shape = int | tuple[int, ...]
Real = int | float | Fraction

_MAX_VARIANCE = discrete.MAX_SCALE**2
# OpenDP draws a vector twenty to thirty times slower than the compiled sampler, which `auto` uses from this length on.
_BULK = 10_000


@runtime_checkable
class NoiseSource(Protocol):
    """What every mechanism of the privacy room draws from.

    Attributes
    ----------
    name
        For ledgers and reports.
    seeded
        True where the draws can be repeated by whoever knows the seed: never for a release.
    """

    @property
    def name(self) -> str:
        """For ledgers and reports."""

    @property
    def seeded(self) -> bool:
        """Whether the draws can be repeated."""

    def laplace(self, scale: Fraction, size: Shape) -> Integers:
        """Draws with P(y) proportional to exp(-|y| / scale).

        Parameters
        ----------
        scale
            Positive, at most 2**50. Make it with `laplace_scale`, which rounds up.
        size
            Length or shape.

        Returns
        -------
        int64, of shape `size`.
        """

    def gaussian(self, variance: Fraction, size: Shape) -> Integers:
        """Draws with P(y) proportional to exp(-y**2 / (2 variance)).

        Parameters
        ----------
        variance
            Positive, at most 2**100. Make it with `gaussian_variance`, which rounds up.
        size
            Length or shape.

        Returns
        -------
        int64, of shape `size`.
        """


def noise_source(kind: Literal["auto", "opendp", "exact"] = "auto") -> NoiseSource:
    """A source of noise for releases.

    Parameters
    ----------
    kind
        "auto" takes OpenDP if it is installed and the own sampler for draws of 10,000 and more, or where it is not;
        "opendp" takes OpenDP for every draw; "exact" takes the own sampler for every draw. All three are exact.

    Raises
    ------
    MissingDependencyError
        For "opendp" where it is not installed.
    ValueError
        For another `kind`.
    """
    if kind not in ("auto", "opendp", "exact"):
        raise ValueError(f"kind must be 'auto', 'opendp' or 'exact', got {kind!r}.")
    if kind == "opendp":
        return OpenDPNoise()
    if kind == "exact" or importlib.util.find_spec("opendp") is None:
        return ExactNoise()
    return _AutoNoise()


def laplace_scale(scale: Real) -> Fraction:
    """The smallest scale on a dyadic grid that is at least `scale`: exact in a double, and fast to sample.

    Guarantee: never below `scale`, and above it by less than one part in 2**39.

    Parameters
    ----------
    scale
        In (0, 2**50].

    Raises
    ------
    ValueError
        If it is not a finite number in that range.
    """
    wanted = _positive(scale, "scale", discrete.MAX_SCALE)
    return _dyadic_above(wanted, 40)


def gaussian_variance(variance: Real) -> Fraction:
    """The smallest variance that is at least `variance` and fast to sample.

    Guarantee: never below `variance`; above it by less than 2**-23 of it up to 2**24, by less than 2**-10 from there
    on, where the standard deviation is rounded up to an integer.

    Parameters
    ----------
    variance
        In (0, 2**100].

    Raises
    ------
    ValueError
        If it is not a finite number in that range.
    """
    wanted = _positive(variance, "variance", _MAX_VARIANCE)
    if wanted > 2**24:
        sigma = math.isqrt(math.ceil(wanted) - 1) + 1
        return Fraction(sigma * sigma)
    return _dyadic_above(wanted, 24)


def refuse_seeded(*things: object, what: str = "a release") -> None:
    """Raise if any of these is a seeded source or was made from its draws.

    Parameters
    ----------
    things
        Noise sources, arrays, or objects with a `seeded` attribute.
    what
        What is refused, for the message.

    Raises
    ------
    SeededNoiseError
        If one is seeded.
    """
    for thing in things:
        if isinstance(thing, SeededDraws) or getattr(thing, "seeded", False):
            raise SeededNoiseError(
                f"{what} was made with seeded noise, which anyone with the seed can take away again. "
                "Use noise_source() instead of SeededNoise."
            )


class ExactNoise:
    """The own sampler of `discrete` on entropy of the operating system (see `NoiseSource`)."""

    name = "exact"
    seeded = False

    def laplace(self, scale: Fraction, size: Shape) -> Integers:
        """See `NoiseSource.laplace`."""
        return _draw_laplace(_system_words, scale, size)

    def gaussian(self, variance: Fraction, size: Shape) -> Integers:
        """See `NoiseSource.gaussian`."""
        return _draw_gaussian(_system_words, variance, size)


class OpenDPNoise:
    """OpenDP's integer mechanisms on zeros (see `NoiseSource`); needs the extra `privacy`.

    The standard deviation of Gaussian draws is rounded up to a double, for OpenDP takes no rational.

    Raises
    ------
    MissingDependencyError
        If opendp is not installed.
    """

    name = "opendp"
    seeded = False

    def __init__(self) -> None:
        if importlib.util.find_spec("opendp") is None:
            raise MissingDependencyError(
                "noise from OpenDP needs the package opendp: pip install 'assay[privacy]'. "
                "Or take the own sampler: noise_source('exact')."
            )

    def laplace(self, scale: Fraction, size: Shape) -> Integers:
        """See `NoiseSource.laplace`."""
        return _opendp_draw("laplace", float_above(_checked_scale(scale)), size)

    def gaussian(self, variance: Fraction, size: Shape) -> Integers:
        """See `NoiseSource.gaussian`."""
        return _opendp_draw("gaussian", _root_above(_checked_variance(variance)), size)


class SeededNoise:
    """The same sampler on a pseudo-random stream: for tests and examples, never for a release.

    Its draws are `SeededDraws`; arithmetic on them gives `SeededDraws` again, and `refuse_seeded` refuses them.

    Parameters
    ----------
    seed
        Non-negative integer. The same seed gives the same draws.
    """

    name = "seeded"
    seeded = True

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(seed))

    def laplace(self, scale: Fraction, size: Shape) -> Integers:
        """See `NoiseSource.laplace`."""
        return _draw_laplace(self._words, scale, size).view(SeededDraws)

    def gaussian(self, variance: Fraction, size: Shape) -> Integers:
        """See `NoiseSource.gaussian`."""
        return _draw_gaussian(self._words, variance, size).view(SeededDraws)

    def _words(self, count: int) -> Words:
        return self._generator.integers(0, 2**64, count, dtype=np.uint64)


class SeededDraws(np.ndarray[Any, np.dtype[Any]]):
    """An array that came out of `SeededNoise`, or out of arithmetic with such an array."""


class _AutoNoise:
    """OpenDP for short draws, the own sampler for long ones."""

    name = "opendp, exact"
    seeded = False

    def __init__(self) -> None:
        self._short = OpenDPNoise()
        self._long = ExactNoise()

    def laplace(self, scale: Fraction, size: Shape) -> Integers:
        return (self._long if _length(size) >= _BULK else self._short).laplace(scale, size)

    def gaussian(self, variance: Fraction, size: Shape) -> Integers:
        return (self._long if _length(size) >= _BULK else self._short).gaussian(variance, size)


def _system_words(count: int) -> Words:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def _draw_laplace(words: Callable[[int], Words], scale: Fraction, size: Shape) -> Integers:
    checked = _checked_scale(scale)
    # Past 2**51 the product with the geometric part may not fit 64 bits; Python's integers take over.
    kind = 0 if checked.numerator < 2**51 else None
    return _draw(words, kind, checked.numerator, checked.denominator, 0, size)


def _draw_gaussian(words: Callable[[int], Words], variance: Fraction, size: Shape) -> Integers:
    checked = _checked_variance(variance)
    num, den = checked.numerator, checked.denominator
    sigma = math.isqrt(num)
    if den == 1 and sigma * sigma == num:
        return _draw(words, 2, sigma, 1, 0, size)
    t = math.isqrt(num // den) + 1
    # The first coin needs 2 num den t^2 times its own count in 64 bits; 12 bits are left for the count.
    kind = 1 if 2 * num * den * t * t < 2**52 else None
    return _draw(words, kind, num, den, t, size)


def _draw(words: Callable[[int], Words], kind: int | None, num: int, den: int, t: int, size: Shape) -> Integers:
    """Draw with machine integers, and with Python's where they do not suffice; `kind` None means for all."""
    from assay.privacy import discrete_numba

    out = np.empty(_length(size), dtype=np.int64)
    # Kind 2 carries sigma where the law on Python's integers takes the variance.
    law = discrete.laplace if kind == 0 or (kind is None and t == 0) else discrete.gaussian
    arguments = (num * num, 1) if kind == 2 else (num, den)
    if kind is None:
        stream = _Stream(words(0), words)
        out[:] = [law(stream.below, *arguments) for _ in range(len(out))]
        return out.reshape(size)
    made, pool, stop = 0, words(0), discrete_numba.WORDS
    while made < len(out):
        if stop == discrete_numba.WORDS:
            pool = np.concatenate([pool, words(24 * min(len(out) - made, 2**17) + 64)])
        count, used, stop = discrete_numba.fill(kind, pool, out[made:], np.uint64(num), np.uint64(den), np.uint64(t))
        made, pool = made + count, pool[used:]
        if stop == discrete_numba.BIG:
            stream = _Stream(pool, words)
            out[made] = law(stream.below, *arguments)
            made, pool = made + 1, stream.rest()
    return out.reshape(size)


class _Stream:
    """Uniform integers of any size from 64-bit words, by the rule of `discrete_numba.below`."""

    def __init__(self, pool: Words, more: Callable[[int], Words]) -> None:
        self._pool = pool
        self._next = 0
        self._more = more

    def below(self, n: int) -> int:
        if n == 1:
            return 0
        width = max(1, -(-n.bit_length() // 64))
        excess = 2 ** (64 * width) % n
        while True:
            value = 0
            for _ in range(width):
                value = value << 64 | self._word()
            if value >= excess:
                return value % n

    def _word(self) -> int:
        if self._next == len(self._pool):
            self._pool, self._next = self._more(256), 0
        self._next += 1
        return int(self._pool[self._next - 1])

    def rest(self) -> Words:
        return self._pool[self._next :]


def _opendp_draw(law: str, scale: float, size: Shape) -> Integers:
    import opendp.prelude as dp

    dp.enable_features("contrib")
    atoms = dp.vector_domain(dp.atom_domain(T="i64"))
    if law == "laplace":
        mechanism = dp.m.make_laplace(atoms, dp.l1_distance(T="i64"), scale)
    else:
        mechanism = dp.m.make_gaussian(atoms, dp.l2_distance(T="i64"), scale)
    return np.array(mechanism([0] * _length(size)), dtype=np.int64).reshape(size)


def _length(size: Shape) -> int:
    sides = size if isinstance(size, tuple) else (size,)
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 0 for side in sides):
        raise ValueError(f"size must be a non-negative integer or a tuple of them, got {size!r}.")
    return math.prod(sides)


def _positive(value: Real, argument: str, limit: int) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction | np.integer | np.floating):
        raise TypeError(f"{argument} must be an integer, a float or a Fraction, got {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{argument} must be finite, got {value}.")
    exact = Fraction(value) if isinstance(value, int | float | Fraction) else Fraction(value.item())
    if not 0 < exact <= limit:
        raise ValueError(f"{argument} must be in (0, 2**{limit.bit_length() - 1}], got {float(value):.6g}.")
    return exact


def _checked_scale(scale: Fraction) -> Fraction:
    return _positive(scale, "scale", discrete.MAX_SCALE)


def _checked_variance(variance: Fraction) -> Fraction:
    return _positive(variance, "variance", _MAX_VARIANCE)


def _dyadic_above(value: Fraction, bits: int) -> Fraction:
    """The smallest k / 2**j that is at least `value`, with k of at most `bits` + 1 bits."""
    magnitude = value.numerator.bit_length() - value.denominator.bit_length()  # floor(log2) or one more
    grid = Fraction(2) ** (magnitude - bits) if magnitude < bits else Fraction(1)
    return math.ceil(value / grid) * grid


def float_above(value: Fraction) -> float:
    """The smallest double that is at least `value`."""
    near = float(value)
    return near if Fraction(near) >= value else math.nextafter(near, math.inf)


def _root_above(value: Fraction) -> float:
    near = math.sqrt(float(value))
    while Fraction(near) ** 2 < value:
        near = math.nextafter(near, math.inf)
    return near
