"""Schemes of other systems: their keys are integers, and their pseudorandom functions use those integers as they are.

A key of such a scheme holds either integers that were imported, or a 256-bit secret of Assay's own, from which the
integers are derived. `keys.use_key` gives both as words; nothing else of Assay sees the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from assay.kernels.chacha import Words
from assay.watermark.schemes import SchemeConfig

SALT_BYTES = 32
"""Random bytes before imported integers: without them the public fingerprint of a short key could be searched."""


@dataclass(frozen=True, kw_only=True)
class ForeignConfig(SchemeConfig):
    """Base of the settings of schemes whose keys are integers.

    Attributes
    ----------
    lowest, highest
        Range of each integer.
    bits
        Derived integers are uniform in [0, 2**bits).
    base
        How written integers are read: 10 (hexadecimal with 0x) or 16.
    completion_only
        Whether the scheme keys on the generated tokens alone. Its sampler and its test then read no prompt.
    """

    lowest: ClassVar[int] = 0
    highest: ClassVar[int] = 2**64 - 1
    bits: ClassVar[int] = 64
    base: ClassVar[int] = 10
    completion_only: ClassVar[bool] = False

    @property
    def n_integers(self) -> int:
        """How many integers a key has."""
        return 1


def packed(config: ForeignConfig, integers: Iterable[int]) -> bytes | str:
    """The integers as 8 little-endian bytes each, in two's complement; or in words what is wrong with them.

    The words do not repeat the integers: they are secrets.
    """
    try:
        values = list(integers)
    except TypeError:
        return f"integers must be {config.n_integers} integers, got {type(integers).__name__}."
    if len(values) != config.n_integers:
        return f"integers must be {config.n_integers} for {config!r}, got {len(values)}."
    for place, value in enumerate(values, start=1):
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            return f"integers must be integers, number {place} is {type(value).__name__}."
        if not config.lowest <= value <= config.highest:
            return f"integers must be in [{config.lowest}, {config.highest}], number {place} is not."
    return b"".join((int(value) % 2**64).to_bytes(8, "little") for value in values)


def unpacked(config: ForeignConfig, material: bytes) -> tuple[int, ...]:
    """The integers that `packed` wrote."""
    values = (int.from_bytes(material[i : i + 8], "little") for i in range(0, len(material), 8))
    return tuple(value - 2**64 if value > config.highest else value for value in values)


def parse(config: ForeignConfig, text: str) -> tuple[int, ...] | str:
    """Integers between commas or white space, in the scheme's base; or in words what is wrong, without the text."""
    entries = text.replace(",", " ").split()
    values = []
    for place, entry in enumerate(entries, start=1):
        try:
            values.append(int(entry, 0 if config.base == 10 else config.base))
        except ValueError:
            kind = "a decimal number, or hexadecimal with 0x" if config.base == 10 else "hexadecimal"
            return f"the key must be {config.n_integers} integers; number {place} is not {kind}."
    return tuple(values)


def as_integers(prf_key: Words) -> Sequence[int]:
    """The integers in the words of a key, each in [0, 2**64)."""
    return [int(low) | int(high) << 32 for low, high in zip(prf_key[::2], prf_key[1::2], strict=True)]
