"""Watermarks: keys, the PRF, one scheme per file, profiles of deployed marks, adapters for generation engines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import KeyInfo, SecretKey

if TYPE_CHECKING:
    from assay.watermark.adapters._chance import WeakMarkWarning
    from assay.watermark.adapters.sequence import generate_sequence
    from assay.watermark.adapters.transformers import for_transformers
    from assay.watermark.dipmark import DipmarkConfig
    from assay.watermark.dual_gumbel import DualGumbelConfig
    from assay.watermark.fixed_list import FixedListConfig
    from assay.watermark.green_list import GreenListConfig
    from assay.watermark.inverse_transform import InverseTransformConfig
    from assay.watermark.keyring import Keyring
    from assay.watermark.payload import PayloadConfig
    from assay.watermark.profiles.hf_kgw import HfKgwConfig
    from assay.watermark.profiles.hf_synthid import HfSynthIdConfig
    from assay.watermark.profiles.sglang_gumbel import SglangGumbelConfig
    from assay.watermark.profiles.synthid_text import SynthIdTextConfig
    from assay.watermark.profiles.vllm_gumbel import VllmGumbelConfig
    from assay.watermark.sequence import SequenceConfig
    from assay.watermark.tournament import TournamentConfig

__all__ = [
    "DipmarkConfig",
    "DualGumbelConfig",
    "FixedListConfig",
    "GreenListConfig",
    "GumbelConfig",
    "HfKgwConfig",
    "HfSynthIdConfig",
    "InverseTransformConfig",
    "KeyInfo",
    "Keyring",
    "PayloadConfig",
    "SecretKey",
    "SequenceConfig",
    "SglangGumbelConfig",
    "SynthIdTextConfig",
    "TournamentConfig",
    "VllmGumbelConfig",
    "WeakMarkWarning",
    "for_transformers",
    "generate_sequence",
]

# Loaded on first use: torch comes with the adapters, cryptography with the keyring, compiled code with most schemes;
# none is needed to test token ids against a Gumbel key.
_HOMES = {
    "DipmarkConfig": "dipmark",
    "DualGumbelConfig": "dual_gumbel",
    "FixedListConfig": "fixed_list",
    "GreenListConfig": "green_list",
    "HfKgwConfig": "profiles.hf_kgw",
    "HfSynthIdConfig": "profiles.hf_synthid",
    "InverseTransformConfig": "inverse_transform",
    "Keyring": "keyring",
    "PayloadConfig": "payload",
    "SequenceConfig": "sequence",
    "SglangGumbelConfig": "profiles.sglang_gumbel",
    "SynthIdTextConfig": "profiles.synthid_text",
    "TournamentConfig": "tournament",
    "VllmGumbelConfig": "profiles.vllm_gumbel",
    "WeakMarkWarning": "adapters._chance",
    "for_transformers": "adapters.transformers",
    "generate_sequence": "adapters.sequence",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"assay.watermark.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'assay.watermark' has no attribute {name!r}")
