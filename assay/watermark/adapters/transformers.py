"""Watermarks inside transformers' `generate`, after temperature, top-k, top-p and min-p.

Law of the text, for a scheme without distortion: exactly that of plain sampling, over keys. Each step returns one-hot
scores, so transformers' own draw picks the keyed token with certainty, and every token is a pure function of (tokens so
far, scores, key, seed).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from assay._errors import GenerationError, MissingDependencyError
from assay.kernels import race
from assay.watermark.adapters._chance import Watched, check_candidates
from assay.watermark.adapters._embedding import completion_only, embedding_sampler
from assay.watermark.keys import SecretKey

try:
    import torch
    from transformers import LogitsProcessor
    from transformers.generation import BaseWatermarkingConfig

    from assay.kernels import torch_race
    from assay.watermark.adapters._device import raced
except ImportError as error:
    raise MissingDependencyError(
        "The watermark for transformers needs torch and transformers. Install them with: pip install 'assay[models]'"
    ) from error


def for_transformers(
    key: SecretKey, *, pad_token_id: int | None = None, seed: int | None = None, payload: int | None = None
) -> BaseWatermarkingConfig:
    """The watermark as an argument of `model.generate(..., do_sample=True, watermarking_config=...)`.

    Guarantee: over keys of a scheme without distortion, such as "gumbel", the text has the law of the same call without
    the watermark. A token is marked where `window` tokens precede it and their context is new in its row; all other
    tokens are drawn from noise that the seed keys.

    Parameters
    ----------
    key
        An active key of a scheme that draws token by token.
    pad_token_id
        The id that pads prompts on the left; a leading run of it is no part of a row's history. Default: the pad id of
        the call's generation settings, which falls back to the end-of-sequence id as in transformers. Give it where
        the tokenizer pads with another id than the model's settings name.
    seed
        Any integer: keys the unmarked draws. Default: drawn from torch's global generator at each call, so that
        `torch.manual_seed` makes the whole text reproducible.
    payload
        An integer that the text will carry, below 2**bits of the key's settings, for scheme "payload-gumbel"; None for
        all others.

    Returns
    -------
    BaseWatermarkingConfig
        Pass it in each call; it writes the key id, never the secret, where generation settings are saved, and settings
        that were saved with it do not load.

    Raises
    ------
    RevokedKeyError
        If the key is retired or revoked.
    ValueError
        If the key is for signing or for a scheme that does not draw token by token, or `pad_token_id` or `seed` is out
        of range.
    GenerationError
        From `generate`: for greedy decoding, also by top_k=1, top_p=0 or min_p=1, beam search and continuous batching,
        where the mark would be absent or the law of the text wrong.

    Warns
    -----
    WeakMarkWarning
        From `generate`, once in a call: if the first 64 tokens of every row were all but decided, as by a temperature
        near 0, so that hardly a mark is in them.

    Notes
    -----
    Rows with equal histories get equal tokens under one key: `num_return_sequences` copies are alike, and so are the
    texts of equal prompts of at least `window` tokens.

    Examples
    --------
    >>> mark = for_transformers(SecretKey.generate())
    >>> model.generate(**inputs, do_sample=True, max_new_tokens=200, watermarking_config=mark)  # doctest: +SKIP
    """
    embedding_sampler(key, b"", payload)  # refuses a key that cannot mark, before any text is made
    for name, value, low in (("pad_token_id", pad_token_id, 0), ("seed", seed, None)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be an integer or None, got {value!r}.")
        if value is not None and low is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}.")
    return _PerCallWatermark(key, pad_token_id, seed, payload)


class _PerCallWatermark(BaseWatermarkingConfig):  # type: ignore[misc]  # transformers is untyped
    """Builds the processor of one `generate` call; immutable, and silent about the secret in every export."""

    # Slots, not attributes: transformers writes and prints `__dict__`.
    __slots__ = ("_key", "_pad_token_id", "_payload", "_seed")

    __eq__ = object.__eq__  # the base is a dataclass without fields, for which all instances are equal
    __hash__ = object.__hash__

    def __init__(self, key: SecretKey, pad_token_id: int | None, seed: int | None, payload: int | None) -> None:
        self._key = key
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._payload = payload

    def validate(self) -> None:
        """Nothing to check: `for_transformers` did."""

    def construct_processor(self, vocab_size: int, device: Any = None) -> _KeyedProcessor:
        """The processor of the call whose settings stand in the caller's frame; see `_call_settings`."""
        settings, prompt_length = _call_settings(self)
        pad = self._pad_token_id if self._pad_token_id is not None else _pad_token_id(settings)
        if self._seed is not None:
            seed = f"seed {self._seed}".encode()
        else:
            seed = torch.randint(-(2**63), 2**63 - 1, (2,), device="cpu").numpy().tobytes()
        draw = embedding_sampler(self._key, seed, self._payload)
        if completion_only(self._key):
            # The prompt is cut away with its padding: a generated token that equals the pad id is a token.
            return _KeyedProcessor(draw, None, prompt_length)
        return _KeyedProcessor(draw, pad)

    def to_dict(self) -> dict[str, Any]:
        """What may be written: the key id and the scheme."""
        return {"assay_watermark": {"key_id": self._key.id, "scheme": self._key.config.tag}}

    def to_json_string(self) -> str:
        """As `to_dict`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        return f"for_transformers({self._key!r}, pad_token_id={self._pad_token_id}, seed={self._seed})"

    def __deepcopy__(self, memo: dict[int, object]) -> _PerCallWatermark:
        return self  # transformers copies generation settings on every call; an immutable object may be shared


class _KeyedProcessor(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Scores to one-hot scores: 0 for the keyed token, -inf for the rest. A pure function of (input_ids, scores)."""

    def __init__(self, draw: Watched, pad_token_id: int | None, unread: int = 0) -> None:
        self._draw = draw
        self._pad_token_id = pad_token_id
        self._unread = unread  # tokens at the start that the scheme does not read

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """One-hot scores, a fresh tensor of the shape, dtype and device of `scores`, which is (rows, V)."""
        if input_ids.ndim != 2:
            raise _continuous_batching_error()
        ids = input_ids.numpy(force=True)[:, self._unread :]
        if torch_race.on_device(scores):
            tokens = raced([(self._draw, ids, self._pad_token_id)], scores)
            if tokens is not None:
                return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
        # Where a small model runs on the CPU, every call here is a thousandth of its step.
        draw = self._draw.draw if self._draw.judged else self._draw
        log_weights = torch_race.as_array(scores)
        return torch.from_numpy(race.one_hot(draw(ids, log_weights, self._pad_token_id), log_weights)).to(scores)


def _call_settings(watermark: _PerCallWatermark) -> tuple[Any, int]:
    """Settings and prompt length of the `generate` call that is building this watermark's processor, checked.

    transformers hands `construct_processor` the vocabulary size and the device only. Whether a mark will survive
    depends on `num_beams`, `do_sample` and the batching, which are in the frame of `_get_logits_processor` above. Where
    they cannot be seen, nothing is generated.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_get_logits_processor":
        frame = frame.f_back
    seen = frame.f_locals if frame is not None else {}
    settings: Any = seen.get("generation_config")
    if (
        "input_ids_seq_length" not in seen
        or getattr(settings, "watermarking_config", None) is not watermark
        or not hasattr(settings, "num_beams")
        or not hasattr(settings, "do_sample")
    ):
        raise GenerationError(
            "the watermark cannot see the settings of this generation, so it refuses to run. Pass it to generate() as "
            "watermarking_config=; if you did, this version of transformers is not supported: use 4.57 to 5.x."
        )
    if seen["input_ids_seq_length"] is None:
        raise _continuous_batching_error()
    if settings.num_beams not in (None, 1):
        raise GenerationError(
            f"num_beams must be 1 for a watermark, got {settings.num_beams}: beam search ranks whole texts and would "
            "undo the keyed draw. Call generate(..., do_sample=True, num_beams=1)."
        )
    if settings.do_sample is not True:
        raise GenerationError(
            f"do_sample must be True for a watermark, got {settings.do_sample}: greedy decoding has no randomness to "
            "key. Call generate(..., do_sample=True); a low temperature stays close to greedy."
        )
    top_k, top_p, min_p = (getattr(settings, name, None) for name in ("top_k", "top_p", "min_p"))
    check_candidates(top_k=top_k, top_p=top_p, min_p=min_p)
    return settings, int(seen["input_ids_seq_length"])


def _continuous_batching_error() -> GenerationError:
    return GenerationError(
        "continuous batching (generate_batch, cache_implementation='paged') shows the watermark only the last token of "
        "each row, so it can neither key a context nor leave out repeated ones. Call generate() with a padded batch."
    )


def _pad_token_id(settings: Any) -> int | None:
    """The pad id that this call fills rows with, None if there is none."""
    for name in ("_pad_token_tensor", "pad_token_id"):
        value = getattr(settings, name, None)
        if value is not None:
            return int(value)
    return None
