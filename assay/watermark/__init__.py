"""Watermarks: keys, the PRF, one scheme per file, adapters for generation engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import KeyInfo, SecretKey

if TYPE_CHECKING:
    from assay.watermark.adapters.transformers import for_transformers
    from assay.watermark.keyring import Keyring

__all__ = ["GumbelConfig", "KeyInfo", "Keyring", "SecretKey", "for_transformers"]


def __getattr__(name: str) -> object:
    # torch comes with the adapter and cryptography with the keyring: neither is needed to test token ids.
    if name == "for_transformers":
        from assay.watermark.adapters.transformers import for_transformers

        return for_transformers
    if name == "Keyring":
        from assay.watermark.keyring import Keyring

        return Keyring
    raise AttributeError(f"module 'assay.watermark' has no attribute {name!r}")
