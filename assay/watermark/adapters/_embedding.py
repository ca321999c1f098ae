"""What the serving adapters share: keys that may embed, and how they draw."""

from __future__ import annotations

from assay._errors import RevokedKeyError
from assay.watermark.adapters._chance import Watched
from assay.watermark.gumbel import unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import sampler_of


def embedding_sampler(key: SecretKey, seed: bytes, payload: int | None = None) -> Watched:
    """How an active key draws the tokens of one call or request; the seed keys all randomness that is not the mark.

    `payload` is what the text is to carry, None for schemes that carry none. What it gives warns where the texts were
    all but decided; see `Watched`.

    Raises
    ------
    TypeError
        If the key is no SecretKey.
    RevokedKeyError
        If it is retired or revoked.
    ValueError
        If it is for signing or for a scheme that does not draw token by token, or the payload does not fit.
    """
    if not isinstance(key, SecretKey):
        raise TypeError(f"key must be a SecretKey, got {type(key).__name__}. Take one from a Keyring by its id.")
    if key.state != "active":
        raise RevokedKeyError(
            f"key {key.id!r} is {key.state}: it may not embed. Use an active key, or make one with `assay keys rotate`."
        )
    return Watched(sampler_of(key.config, use_key(key), unmarked_key(seed), payload=payload))


def completion_only(key: SecretKey) -> bool:
    """Whether the key's scheme reads the generated tokens alone."""
    return bool(getattr(key.config, "completion_only", False))
