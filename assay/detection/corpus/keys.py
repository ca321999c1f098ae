"""What the workers of a run against keys know of a key, and the columns of what they find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from assay.kernels.chacha import Words
from assay.watermark.schemes import SchemeConfig

COLUMNS: Final[Mapping[str, type]] = MappingProxyType(
    {
        "n_tokens": int,
        "n_scored": int,
        "n_repeats_dropped": int,
        "statistic": float,
        "log_pvalue": float,
        "pvalue": float,
        "log_evalue": float,
        "key_id": str,
        "scheme": str,
    }
)


@dataclass(frozen=True)
class DetectionKey:
    """What a worker knows of a key: its public name and the PRF key derived from it.

    Attributes
    ----------
    id, config
        Key id and the scheme's settings.
    words
        uint32, from `assay.watermark.keys.use_key`. Secret.
    """

    id: str
    config: SchemeConfig
    words: Words

    def __repr__(self) -> str:
        return f"DetectionKey(id={self.id!r}, config={self.config!r}, words=<hidden>)"
