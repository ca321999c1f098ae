"""Text from the configured model, marked with a key: one generation at a time, a short queue, tokens as they come.

The model is loaded at the first request and kept. Whatever is generated carries the mark: there is no way here to ask
for text without it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from assay._errors import TextError

if TYPE_CHECKING:
    from assay.watermark.keys import SecretKey

Finish = Literal["stop", "length"]


class BusyError(Exception):
    """The queue is full."""


class UnavailableError(Exception):
    """There is no model, or it could not be loaded."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes
    ----------
    max_tokens
        At least 1.
    temperature
        Above 0.
    top_p
        In (0, 1].
    seed
        Keys the draws that are not marked; None for fresh randomness.
    stop
        Texts before which generation ends.
    payload
        What a key of scheme "payload-gumbel" writes; None for all others.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    payload: int | None = None


@dataclass
class Completion:
    """A completion that is being made. Iterate for pieces of its text; afterwards the other fields are filled.

    Attributes
    ----------
    prompt_tokens
        Tokens of the prompt, with those that the tokenizer adds.
    completion_tokens
        Tokens drawn, with the one that ended the text.
    finish_reason
        "stop" for an end of text or a stop text, "length" for `max_tokens`; None before the end.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: Finish | None = None
    _events: queue.SimpleQueue[str | BaseException | None] = field(default_factory=queue.SimpleQueue, repr=False)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)

    def __iter__(self) -> Iterator[str]:
        """Pieces as they come; whatever broke the generation is raised here."""
        while (event := self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event

    def cancel(self) -> None:
        """Nobody waits for it: end it at the next token."""
        self._cancelled.set()


class Generator:
    """The model of a service, and who waits for it.

    Parameters
    ----------
    spec
        As `assay.models.load_model` takes it; None for no model.
    most_waiting
        Completions that may wait or run; more are refused.
    """

    def __init__(self, spec: str | None, *, most_waiting: int = 8) -> None:
        self._spec = spec
        self._most_waiting = most_waiting
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._pending = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="assay-generation")
        self._loaded: tuple[Any, Any] | None = None

    @property
    def name(self) -> str | None:
        """The model's public name: no folder of this machine is told."""
        if self._spec is None:
            return None
        return Path(self._spec).name if Path(self._spec).is_dir() else self._spec

    def begin(self, prompt: str | list[int], key: SecretKey, sampling: Sampling) -> Completion:
        """Put a completion into the queue.

        Raises
        ------
        ValueError
            If the prompt or the key does not fit the model; nothing was generated.
        BusyError, UnavailableError
            If the queue is full, or there is no model.
        """
        from assay.watermark.adapters.transformers import for_transformers

        model, tokenizer = self._load()
        ids = _prompt_ids(prompt, tokenizer, model)
        longest = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
        if len(ids) + sampling.max_tokens > longest:
            raise ValueError(
                f"prompt and max_tokens must have at most {longest} tokens together, got {len(ids)} and "
                f"{sampling.max_tokens}. Shorten one of them."
            )
        mark = for_transformers(key, seed=sampling.seed, payload=sampling.payload)
        with self._lock:
            if self._pending >= self._most_waiting:
                raise BusyError("other completions are being made; try again soon.")
            self._pending += 1
        completion = Completion(prompt_tokens=len(ids))
        self._worker.submit(self._run, ids, mark, sampling, completion)
        return completion

    def close(self) -> None:
        """End the worker after what is in the queue."""
        self._worker.shutdown()

    def _load(self) -> tuple[Any, Any]:
        from assay.models import load_model, load_tokenizer_for_generation

        if self._spec is None:
            raise UnavailableError("this service has no model: start it with --model.")
        with self._loading:
            if self._loaded is None:
                try:
                    self._loaded = load_model(self._spec), load_tokenizer_for_generation(self._spec)
                except (ImportError, OSError, ValueError) as error:
                    raise UnavailableError("the model of this service could not be loaded.") from error
            return self._loaded

    def _run(self, ids: list[int], mark: Any, sampling: Sampling, completion: Completion) -> None:
        try:
            if not completion._cancelled.is_set():
                self._generate(ids, mark, sampling, completion)
            completion._events.put(None)
        except BaseException as error:  # it belongs to whoever waits
            completion._events.put(error)
        finally:
            with self._lock:
                self._pending -= 1

    def _generate(self, ids: list[int], mark: Any, sampling: Sampling, completion: Completion) -> None:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        model, tokenizer = self._loaded or self._load()
        ends = model.generation_config.eos_token_id
        pad = model.generation_config.pad_token_id
        first_end = ends[0] if isinstance(ends, list) else ends
        settings = GenerationConfig(
            do_sample=True,
            num_beams=1,
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            bos_token_id=model.generation_config.bos_token_id,
            eos_token_id=ends,
            pad_token_id=first_end if pad is None else pad,
            watermarking_config=mark,
        )
        written = _Written(len(ids), tokenizer, frozenset(np.atleast_1d([] if ends is None else ends).tolist()))

        def step(tokens: Any, scores: Any, **_: Any) -> Any:
            completion.completion_tokens = tokens.shape[1] - len(ids)
            piece, stopped = written.add(tokens[0], sampling.stop)
            if piece:
                completion._events.put(piece)
            return torch.full((1,), stopped or completion._cancelled.is_set(), dtype=torch.bool)

        prompt = torch.tensor([ids])
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([step]),
            )
        completion.finish_reason = "stop" if written.ended else "length"
        rest = written.rest()
        if rest:
            completion._events.put(rest)


class _Written:
    """Text from tokens as they come: nothing is told that a later token could still change or a stop text cut off."""

    def __init__(self, prompt_length: int, tokenizer: Any, ends: frozenset[int]) -> None:
        self.ended = False
        self._prompt_length = prompt_length
        self._tokenizer = tokenizer
        self._ends = ends
        self._text = ""
        self._told = 0

    def add(self, tokens: Any, stop: tuple[str, ...]) -> tuple[str, bool]:
        """The next piece, and whether a stop text has come."""
        ids = tokens[self._prompt_length :].tolist()
        if ids and ids[-1] in self._ends:
            self.ended = True
            ids = ids[:-1]
        self._text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        found = [place for one in stop if (place := self._text.find(one)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.ended = True
            return self.rest(), True
        # A character of several tokens decodes to U+FFFD until its last one.
        safe = len(self._text.rstrip("\ufffd"))
        for one in stop:
            for length in range(min(len(one) - 1, len(self._text)), 0, -1):
                if self._text.endswith(one[:length]):
                    safe = min(safe, len(self._text) - length)
                    break
        return self._tell(max(safe, self._told)), False

    def rest(self) -> str:
        """What has not been told."""
        return self._tell(len(self._text))

    def _tell(self, until: int) -> str:
        piece = self._text[self._told : until]
        self._told = until
        return piece


def _prompt_ids(prompt: str | list[int], tokenizer: Any, model: Any) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
    else:
        ids = list(prompt)
        size = int(model.config.vocab_size)
        if any(not 0 <= one < size for one in ids):
            raise ValueError(f"prompt must be token ids from 0 to {size - 1}.")
    if not ids:
        start = model.generation_config.bos_token_id
        if start is None:
            raise TextError("prompt must not be empty: this model has no token that begins a text.")
        ids = [int(start)]
    return ids
