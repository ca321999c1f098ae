"""Watermarks inside vLLM: a V1 logits processor that draws the token itself and leaves the engine no choice.

vLLM calls logits processors before temperature and truncation, so both are done here, from the request's own settings.
What comes back is one-hot, which temperature, top-k, top-p and min-p do not change: the engine then draws that token
with certainty. Source: `vllm.v1.sample.logits_processor` (interface); run with 0.32.
"""

from __future__ import annotations

import math
import os
import secrets
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from assay._errors import GenerationError, KeyringError, MissingDependencyError
from assay.watermark.adapters._chance import check_candidates
from assay.watermark.adapters._embedding import completion_only, embedding_sampler
from assay.watermark.keys import SecretKey

if TYPE_CHECKING:
    import torch

    from assay.kernels.scoring.decoding import Decoding

KEYRING, KEY_ID, PASSPHRASE, PASSPHRASE_FILE = (
    "ASSAY_KEYRING",
    "ASSAY_KEY_ID",
    "ASSAY_PASSPHRASE",
    "ASSAY_PASSPHRASE_FILE",
)
_SWITCH, _SEED = "assay_watermark", "assay_seed"
_DECODING = ("temperature", "top_k", "top_p", "min_p")
_TAIL = 64  # tokens at a request's end that its engine may replace
_GREEDY = 1e-5  # vLLM's own limit, below which a temperature means greedy decoding


def key_from_environment() -> SecretKey:
    """The key that the environment names: keyring path, key id, and a passphrase that is in no command line.

    Reads ASSAY_KEYRING, ASSAY_KEY_ID and, for an encrypted keyring, ASSAY_PASSPHRASE_FILE or ASSAY_PASSPHRASE.

    Raises
    ------
    KeyringError
        If one is missing, or the keyring cannot be opened.
    UnknownKeyError
        If the keyring has no such key.
    """
    from assay.watermark.keyring import Keyring, is_encrypted

    for name in (KEYRING, KEY_ID):
        if not os.environ.get(name):
            raise KeyringError(f"{name} must be set in the environment of the engine: it names the watermark's key.")
    path = Path(os.environ[KEYRING]).expanduser()
    passphrase = None
    if is_encrypted(path):
        if file := os.environ.get(PASSPHRASE_FILE):
            try:
                passphrase = Path(file).read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
            except OSError as error:
                raise KeyringError(f"{PASSPHRASE_FILE} cannot be read: {error.strerror}.") from None
        else:
            passphrase = os.environ.get(PASSPHRASE)
        if not passphrase:
            raise KeyringError(f"keyring {path} is encrypted: set {PASSPHRASE_FILE} or {PASSPHRASE}.")
    return Keyring.open(path, passphrase=passphrase)[os.environ[KEY_ID]]


def decoding_of(params: Any) -> tuple[Decoding, Decoding] | None:
    """The request's decoding rule, in vLLM's order: temperature and min-p, then top-k and top-p; None if opted out.

    `SamplingParams.extra_args` may hold "assay_watermark": False or 0, which leaves the request unmarked, and
    "assay_temperature", "assay_top_k", "assay_top_p", "assay_min_p", which stand in for the engine's own settings.

    Raises
    ------
    ValueError
        If the request is greedy, also by top_k=1 or min_p=1, uses penalties, which vLLM applies too late to matter, or
        a setting is out of range.
    """
    from assay.kernels.scoring.decoding import Decoding

    extra = params.extra_args or {}
    switch = extra.get(_SWITCH, True)
    # Over HTTP vLLM takes texts and numbers alone, and turns false into 0.
    if not isinstance(switch, int) or switch not in (0, 1):
        raise ValueError(f"{_SWITCH} must be true or false, got {switch!r}.")
    if not switch:
        return None
    seed = extra.get(_SEED)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"{_SEED} must be an integer, got {seed!r}.")
    temperature, top_k, top_p, min_p = (extra.get(f"assay_{name}", getattr(params, name)) for name in _DECODING)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature >= _GREEDY:
        raise ValueError(
            f"temperature must be above 0 for a watermark, got {temperature!r}: greedy decoding has no randomness to "
            f'key. Raise it, or opt out with extra_args={{"{_SWITCH}": false}}.'
        )
    for name, neutral in (("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("repetition_penalty", 1.0)):
        if getattr(params, name, neutral) != neutral:
            raise ValueError(
                f"{name} must be {neutral:g} with a watermark, got {getattr(params, name)}: vLLM applies it after the "
                f'token is drawn. Leave it out, or opt out with extra_args={{"{_SWITCH}": false}}.'
            )
    first = Decoding(temperature=float(temperature), min_p=min_p or None)
    second = Decoding(top_k=top_k if top_k and top_k > 0 else None, top_p=top_p)
    otherwise = f' Or opt out with extra_args={{"{_SWITCH}": false}}.'
    check_candidates(top_k=second.top_k, min_p=first.min_p, otherwise=otherwise)
    return first, second


class RequestRows:
    """The requests of a running batch by row, and the draw of each; knows nothing of vLLM's classes.

    Parameters
    ----------
    key
        An active key of a scheme that draws token by token.
    """

    def __init__(self, key: SecretKey) -> None:
        embedding_sampler(key, b"")  # refuses a key that may not embed before the first request
        self._key = key
        self._rows: dict[int, _Row] = {}

    def update(self, batch_update: Any) -> None:
        """Follow the batch: requests removed, then added, then moved; None changes nothing."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            # A new request replaces whatever stood in its row.
            self._rows.pop(index, None)
            rule = decoding_of(params)
            if rule is not None:
                self._rows[index] = _Row(self._key, rule, params, prompt, output)
        for source, target, direction in batch_update.moved:
            moved, there = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if there is not None and direction.name == "SWAP":
                self._rows[source] = there

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits, shape (rows, V), with the rows of marked requests made one-hot in place.

        Raises
        ------
        GenerationError
            If a request's tokens are not known yet, as under asynchronous scheduling.
        """
        import torch

        from assay.kernels.scoring.decoding import warp
        from assay.watermark.adapters._device import raced

        groups: dict[tuple[Decoding, Decoding], list[int]] = {}
        for index in sorted(index for index in self._rows if index < logits.shape[0]):
            groups.setdefault(self._rows[index].rule, []).append(index)
        # Every token is drawn before a row is written: what cannot be drawn leaves the logits as they were.
        drawn = []
        for (first, second), rows in groups.items():
            draws = [(self._rows[index].draw, self._rows[index].history(), None) for index in rows]
            scores = warp(warp(logits[rows].float(), first), second)
            tokens = raced(draws, scores)
            if tokens is None:
                array = scores.numpy(force=True)
                each = [draw(ids, array[i : i + 1], pad)[0] for i, (draw, ids, pad) in enumerate(draws)]
                tokens = torch.tensor(each, device=logits.device)
            drawn.append((torch.tensor(rows, device=logits.device), tokens))
        for places, tokens in drawn:
            logits[places] = -math.inf
            logits[places, tokens] = 0.0
        return logits


class _Row:
    """One request: its decoding rule, its prompt, and the engine's own, growing list of its output."""

    def __init__(self, key: SecretKey, rule: tuple[Decoding, Decoding], params: Any, prompt: Any, output: list[int]):
        extra = params.extra_args or {}
        self.rule = rule
        read = [] if prompt is None or completion_only(key) else list(prompt)
        self._prompt_length, self._output = len(read), output
        self._ids = np.array(read, dtype=np.int64)
        number = extra.get(_SEED, params.seed)
        # Without a seed two requests must not share noise; with one, equal requests give equal texts.
        seed = secrets.token_bytes(16) if number is None else f"vllm {number} {prompt}".encode()
        self.draw = embedding_sampler(key, seed)

    def history(self) -> npt.NDArray[np.int64]:
        """Prompt and output so far, shape (1, t)."""
        # Only what is new is read: converting thousands of Python's integers would cost more than the draw. An engine
        # that takes tokens back, as of a draft, takes the last ones.
        known = len(self._ids) - self._prompt_length
        tail = max(0, known - _TAIL)
        if self._ids[self._prompt_length + tail :].tolist() != self._output[tail:known]:
            known = tail
        new = self._output[known:]
        if -1 in new:
            raise GenerationError(
                "vLLM has not said yet which tokens this request has (placeholders of -1): the mark needs them. Start "
                "the engine without asynchronous scheduling: --no-async-scheduling, or async_scheduling=False."
            )
        self._ids = np.concatenate([self._ids[: self._prompt_length + known], np.array(new, dtype=np.int64)])
        return self._ids[None]


def _logits_processor() -> type:
    """The class that vLLM loads, built on vLLM's own."""
    try:
        base: Any = import_module("vllm.v1.sample.logits_processor").LogitsProcessor
    except ImportError as error:
        raise MissingDependencyError(
            "The watermark for vLLM needs vllm with its V1 logits processors. Install it as vLLM's pages say; Assay "
            "does not."
        ) from error

    class WatermarkLogitsProcessor(base):  # type: ignore[misc]  # vLLM may be missing
        """The watermark of the key that the environment names; see `key_from_environment` and `decoding_of`."""

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            """Refuse a request that cannot be marked, before it runs."""
            decoding_of(sampling_params)

        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            self._requests = RequestRows(key_from_environment())

        def is_argmax_invariant(self) -> bool:
            """False: vLLM then calls it in every step, for greedy engines too."""
            return False

        def update_state(self, batch_update: Any) -> None:
            """See `RequestRows.update`."""
            self._requests.update(batch_update)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            """See `RequestRows.apply`."""
            return self._requests.apply(logits)

    WatermarkLogitsProcessor.__module__ = __name__
    WatermarkLogitsProcessor.__qualname__ = "WatermarkLogitsProcessor"
    return WatermarkLogitsProcessor


def __getattr__(name: str) -> Any:
    # vLLM is needed for the class alone, which engines load by the name "assay.watermark.adapters.vllm:...".
    if name == "WatermarkLogitsProcessor":
        globals()[name] = _logits_processor()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
