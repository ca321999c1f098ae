"""Schemes: settings known by a name and a version, both bound into the key derivation, and how each draws tokens.

A scheme registers its settings class here, so that a keyring can be read back without importing every scheme.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from assay.kernels.chacha import Words

Purpose = Literal["watermark", "signing"]

Sampler = Callable[
    [npt.NDArray[np.int64], npt.NDArray[np.float32] | npt.NDArray[np.float64], int | None], npt.NDArray[np.int64]
]
"""`(ids, log_weights, pad_token_id) -> tokens`: the next token of each row, a pure function of its arguments.

ids: int64, shape (rows, t), padded on the left with `pad_token_id`, or with -1 where that is None. log_weights: float32
or float64, shape (rows, V), unnormalised log-probabilities after temperature and truncation, -inf for a token that must
not be drawn. tokens: int64, shape (rows,).
"""


@dataclass(frozen=True, kw_only=True)
class SchemeConfig:
    """Base of all scheme settings.

    Attributes
    ----------
    scheme, version
        What the settings are for; bound into the key derivation. A scheme that changes its words changes its version.
    purpose
        "watermark" or "signing": a key of one purpose is refused where the other is needed.
    distortion_free
        Whether the text of a watermark scheme has the law of the model, over keys.
    """

    scheme: ClassVar[str]
    version: ClassVar[int]
    purpose: ClassVar[Purpose] = "watermark"
    distortion_free: ClassVar[bool] = True

    def parameters(self) -> dict[str, Any]:
        """The settings as a JSON-ready dict."""
        return asdict(self)

    def canonical(self) -> bytes:
        """The settings as bytes: JSON with sorted keys and no spaces; equal settings give equal bytes."""
        return json.dumps(self.parameters(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def tag(self) -> str:
        """Scheme and version, such as "gumbel/1"."""
        return f"{self.scheme}/{self.version}"


_REGISTRY: dict[str, type[SchemeConfig]] = {}

# Where Assay's own schemes register. A scheme's module is loaded when a name is looked up, not before.
_HOMES = {
    "dipmark": "assay.watermark.dipmark",
    "dual-gumbel": "assay.watermark.dual_gumbel",
    "ed25519": "assay.watermark.signing",
    "fixed-list": "assay.watermark.fixed_list",
    "green-list": "assay.watermark.green_list",
    "gumbel": "assay.watermark.gumbel",
    "hf-kgw": "assay.watermark.profiles.hf_kgw",
    "hf-synthid": "assay.watermark.profiles.hf_synthid",
    "inverse-transform": "assay.watermark.inverse_transform",
    "payload-gumbel": "assay.watermark.payload",
    "sequence": "assay.watermark.sequence",
    "sglang-gumbel": "assay.watermark.profiles.sglang_gumbel",
    "synthid-text": "assay.watermark.profiles.synthid_text",
    "tournament": "assay.watermark.tournament",
    "vllm-gumbel": "assay.watermark.profiles.vllm_gumbel",
}

C = TypeVar("C", bound=type[SchemeConfig])


def register(config: C) -> C:
    """Class decorator: make a settings class known by its scheme and version."""
    tag = f"{config.scheme}/{config.version}"
    if tag in _REGISTRY:
        raise ValueError(f"scheme {tag!r} is registered already, by {_REGISTRY[tag].__qualname__}.")
    _REGISTRY[tag] = config
    return config


def config_from(scheme: str, version: int, parameters: dict[str, Any]) -> SchemeConfig:
    """The settings that `SchemeConfig.parameters` described.

    Raises
    ------
    ValueError
        If the scheme or version is unknown, or a parameter is unknown, missing or out of range.
    """
    if scheme in _HOMES:
        import_module(_HOMES[scheme])
    tag = f"{scheme}/{version}"
    if tag not in _REGISTRY:
        raise ValueError(f"scheme must be one of {list(known_schemes())}, got {tag!r}. A newer Assay may know it.")
    config = _REGISTRY[tag]
    accepted = {field.name for field in fields(config)}
    if not isinstance(parameters, dict) or not accepted >= parameters.keys():
        # Names alone: a value that is in the wrong place may be a secret.
        got = sorted(map(str, parameters)) if isinstance(parameters, dict) else type(parameters).__name__
        raise ValueError(f"parameters of {tag!r} must be among {sorted(accepted)}, got {got}.")
    required = (one.name for one in fields(config) if one.default is MISSING and one.default_factory is MISSING)
    missing = [name for name in required if name not in parameters]
    if missing:
        raise ValueError(f"parameters of {tag!r} must include {missing}, which have no default.")
    return config(**parameters)


def newest(scheme: str) -> type[SchemeConfig]:
    """The settings class of the highest version of a scheme, named as in "gumbel".

    Raises
    ------
    ValueError
        If the scheme is unknown.
    """
    if scheme in _HOMES:
        import_module(_HOMES[scheme])
    versions = [config for config in _REGISTRY.values() if config.scheme == scheme]
    if not versions:
        names = sorted({_REGISTRY[tag].scheme for tag in known_schemes()})
        raise ValueError(f"scheme must be one of {names}, got {scheme!r}.")
    return max(versions, key=lambda config: config.version)


def known_schemes() -> tuple[str, ...]:
    """Tags of all registered schemes, sorted."""
    for home in _HOMES.values():
        import_module(home)
    return tuple(sorted(_REGISTRY))


def sampler_of(config: SchemeConfig, prf_key: Words, unmarked: Words, *, payload: int | None = None) -> Sampler:
    """How a scheme draws the next tokens under one key.

    Parameters
    ----------
    config
        The key's settings.
    prf_key
        uint32, shape (8,), from `keys.use_key`: keys the mark.
    unmarked
        uint32, shape (8,), from `gumbel.unmarked_key`: keys all randomness that is not the mark.
    payload
        What the text is to carry, for schemes with a payload, which carry 0 by default; None for all others.

    Raises
    ------
    ValueError
        If the scheme does not draw token by token, carries no payload, or not so large a one.
    """
    build = getattr(import_module(type(config).__module__), "sampler", None)
    if build is None:
        raise ValueError(f"scheme {config.tag!r} does not draw token by token; see its own page for how to generate.")
    if payload is None:
        built: Sampler = build(prf_key, config, unmarked)
    elif not hasattr(config, "bits"):
        raise ValueError(f"payload must be None for scheme {config.tag!r}, which carries none; use 'payload-gumbel'.")
    else:
        built = build(prf_key, config, unmarked, payload)
    return built
