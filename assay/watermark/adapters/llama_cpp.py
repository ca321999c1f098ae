"""Watermarks inside llama-cpp-python: a logits processor that draws the token itself; llama.cpp then has no choice.

Logits processors come first in llama.cpp's chain, so truncation and temperature are done here, in llama.cpp's order:
top-k, top-p, min-p, temperature. Source: `llama_cpp.LogitsProcessor`, a callable (input_ids, scores) -> scores; run
with 0.3.36.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import numpy as np
import numpy.typing as npt

from assay._errors import GenerationError
from assay.watermark.adapters._chance import check_candidates
from assay.watermark.adapters._embedding import completion_only, embedding_sampler
from assay.watermark.keys import SecretKey
from assay.watermark.schemes import Sampler

Ids = npt.NDArray[np.intc]
Scores = npt.NDArray[np.float32]


def for_llama_cpp(
    key: SecretKey,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 0.95,
    min_p: float = 0.05,
    prompt_length: int | None = None,
    seed: int | None = None,
) -> LlamaCppMark:
    """The watermark of one completion.

    Guarantee: over keys of a scheme without distortion the text has the law of llama.cpp's own sampling with these
    settings, repeated contexts included. Each token is a pure function of the tokens so far, the scores, key and seed.

    Parameters
    ----------
    key
        An active key of a scheme that draws token by token.
    temperature
        > 0.
    top_k
        Keep so many of the largest logits, at least 2; 0 or below keeps all.
    top_p
        In (0, 1]: keep the likeliest tokens until their mass reaches it.
    min_p
        In [0, 1): keep tokens with at least this share of the largest probability.
    prompt_length
        Tokens of the prompt, as llama.cpp counts them, begin-of-sequence included; needed by schemes that read the
        completion alone.
    seed
        Any integer: keys the unmarked draws. Default: fresh randomness.

    Returns
    -------
    LlamaCppMark
        Of `Llama.create_completion` it is an entry of `logits_processor`, and its `check` one of `stopping_criteria`.
        The settings of the call itself no longer matter, since one token is left; its penalties do not act at all.

    Raises
    ------
    RevokedKeyError
        If the key is retired or revoked.
    ValueError
        If a setting is out of range or leaves one candidate, or the scheme needs `prompt_length`.

    Examples
    --------
    >>> mark = for_llama_cpp(SecretKey.generate(), temperature=0.7)
    >>> llm.create_completion(  # doctest: +SKIP
    ...     prompt, logits_processor=LogitsProcessorList([mark]), stopping_criteria=StoppingCriteriaList([mark.check])
    ... )
    """
    noise = secrets.token_bytes(16) if seed is None else f"llama.cpp {seed}".encode()
    draw = embedding_sampler(key, noise)
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"temperature must be a positive number, got {temperature}: greedy text cannot be marked.")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise ValueError(f"top_k must be an integer, got {top_k!r}.")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p must be in [0, 1), got {min_p}.")
    check_candidates(top_k=top_k, min_p=min_p)
    start = 0
    if completion_only(key):
        if isinstance(prompt_length, bool) or not isinstance(prompt_length, int) or prompt_length < 0:
            raise ValueError(
                f"prompt_length must be given for scheme {key.config.scheme!r}, which reads the completion alone, got "
                f"{prompt_length!r}. Complete ids = llm.tokenize(prompt.encode(), special=True), and pass len(ids)."
            )
        start = prompt_length
    return LlamaCppMark(draw, start, partial(truncated, top_k=top_k, top_p=top_p, min_p=min_p), temperature)


class LlamaCppMark:
    """The watermark of one completion, made by `for_llama_cpp`: a logits processor, and the check that it was used.

    llama.cpp calls logits processors from C. An exception is then printed and lost, and the token is drawn without the
    mark; `check`, which is called from Python, raises it.
    """

    def __init__(self, draw: Sampler, start: int, truncate: Callable[[Scores], Scores], temperature: float) -> None:
        self._draw = draw
        self._start = start  # tokens before it are not read
        self._truncate = truncate
        self._temperature = np.float32(temperature)
        self._seen: Ids | None = None
        self._error: BaseException | None = None

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        """0 for the token drawn and -inf for the rest: a fresh array, shape (V,).

        Parameters
        ----------
        input_ids
            int32, shape (n,): prompt and completion so far.
        scores
            float32, shape (V,): logits.

        Raises
        ------
        GenerationError
            If the completion has a grammar or a draft model; see `check`.
        ValueError
            If the scores cannot be drawn from.
        """
        try:
            _refuse(_sampling_call(sys._getframe(1)))
            kept = self._truncate(scores) / self._temperature
            history = np.asarray(input_ids[self._start :], dtype=np.int64)
            token = int(self._draw(history[None], kept[None], None)[0])
        except BaseException as error:
            self._error = error
            raise
        self._seen = np.array(input_ids)
        out = np.full_like(scores, -np.inf)
        out[token] = 0.0
        return out

    def check(self, input_ids: Ids | None = None, scores: Scores | None = None) -> bool:
        """False, which lets llama.cpp go on: its last token was drawn with the mark.

        Give it to `stopping_criteria`, or call it after a completion that takes none.

        Parameters
        ----------
        input_ids
            int32, shape (n,): what came before the token; default: what the mark was shown last.
        scores
            Not used.

        Raises
        ------
        GenerationError
            If the token was drawn without the mark, or after other tokens than the mark was shown.
        BaseException
            What the mark raised in the meantime, where llama.cpp lost it.
        """
        if self._error is not None:
            raise self._error
        if self._seen is None or (input_ids is not None and not np.array_equal(input_ids, self._seen)):
            raise GenerationError(
                "llama.cpp drew a token without the watermark. Pass the mark as logits_processor=, and leave out "
                "logit_bias=, with which llama-cpp-python drops all logits processors."
            )
        return False


def _sampling_call(frame: FrameType | None) -> dict[str, object]:
    """What `Llama.sample` was called with, above a logits processor's frame; empty where there is no such call."""
    while frame is not None:
        if frame.f_code.co_name == "sample" and "grammar" in frame.f_code.co_varnames:
            return frame.f_locals
        frame = frame.f_back
    return {}


def _refuse(call: dict[str, object]) -> None:
    if call.get("grammar") is not None:
        raise GenerationError(
            "grammar must be None for a watermark: llama.cpp applies it after the token is drawn, and ends the whole "
            "process if the token does not fit. Leave out grammar=, and response_format= of a chat."
        )
    if getattr(call.get("self"), "draft_model", None) is not None:
        raise GenerationError(
            "draft_model must be None for a watermark: llama-cpp-python shows logits processors the drafted tokens as "
            "if they were text, so that wrong contexts would be keyed. Load the model without it."
        )


def truncated(scores: Scores, *, top_k: int, top_p: float, min_p: float) -> Scores:
    """The scores after top-k, top-p and min-p, each on what the one before left; -inf where removed.

    Parameters
    ----------
    scores
        float32, shape (V,).
    top_k, top_p, min_p
        As in `for_llama_cpp`. Of tokens that tie at an edge those with the lowest ids stay.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > -np.inf]
    if top_k > 0:
        order = order[:top_k]
    if len(order):
        p = np.exp(scores[order].astype(np.float64) - float(scores[order[0]]))
        p /= p.sum()
        if top_p < 1.0:
            order = order[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
        order = order[p[: len(order)] >= min_p * p[0]]
    out: Scores = np.full_like(scores, -np.inf)
    out[order] = scores[order]
    return out
