"""Ed25519 signing keys: the keyring's 32-byte secret is the seed of RFC 8032; used for reports, never for watermarks.

Reference: RFC 8032, section 5.1; FIPS 186-5, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from assay._errors import RevokedKeyError
from assay.watermark.keys import SecretKey
from assay.watermark.schemes import Purpose, SchemeConfig, register


@register
@dataclass(frozen=True, kw_only=True)
class Ed25519Config(SchemeConfig):
    """Settings of a signing key: there are none."""

    scheme: ClassVar[str] = "ed25519"
    version: ClassVar[int] = 1
    purpose: ClassVar[Purpose] = "signing"


def _private_key(key: SecretKey) -> Ed25519PrivateKey:
    if not isinstance(key.config, Ed25519Config):
        raise ValueError(
            f"key must be for scheme 'ed25519', got {key.config.tag!r} (key {key.id!r}); a watermark key never signs. "
            "Make a signing key with SecretKey.generate(config=Ed25519Config()) or `assay keys new --scheme ed25519`."
        )
    return Ed25519PrivateKey.from_private_bytes(key._secret)


def sign(data: bytes, key: SecretKey) -> bytes:
    """The Ed25519 signature of `data`: deterministic, so equal input gives equal bytes.

    Parameters
    ----------
    data
        What is signed; any length.
    key
        An active key of scheme "ed25519".

    Returns
    -------
    64 bytes.

    Raises
    ------
    ValueError
        If the key is not a signing key.
    RevokedKeyError
        If the key is retired or revoked: what it signed stays verifiable, but it signs nothing new.
    """
    private_key = _private_key(key)
    if key.state != "active":
        raise RevokedKeyError(
            f"key must be active to sign, got key {key.id!r} in state {key.state!r}. Use the key that replaced it."
        )
    return private_key.sign(data)


def public_key(key: SecretKey) -> bytes:
    """The public half of a signing key in any state: 32 raw bytes, free to publish.

    Raises
    ------
    ValueError
        If the key is not a signing key.
    """
    return _private_key(key).public_key().public_bytes_raw()


def verify(data: bytes, signature: bytes, public_key_bytes: bytes) -> bool:
    """Whether `signature` is the signature of exactly `data` under the public key.

    True says that the holder of the secret signed these bytes; whose key it is must be known from elsewhere.

    Parameters
    ----------
    data
        What was signed.
    signature
        64 bytes from `sign`. Any other length is no signature and gives False.
    public_key_bytes
        32 bytes from `public_key`.

    Raises
    ------
    ValueError
        If the public key does not have 32 bytes.
    """
    if not isinstance(public_key_bytes, bytes) or len(public_key_bytes) != 32:
        size = f"{len(public_key_bytes)} bytes" if isinstance(public_key_bytes, bytes) else repr(public_key_bytes)
        raise ValueError(f"public_key_bytes must be 32 bytes, got {size}. `assay keys export-public` shows the key.")
    try:
        Ed25519PublicKey.from_public_bytes(public_key_bytes).verify(signature, data)
    except InvalidSignature:
        return False
    return True
