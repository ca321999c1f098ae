"""Watermarks inside llama-cpp-python: a logits processor that draws the token itself; llama.cpp then has no choice.

Logits processors come first in llama.cpp's chain, so truncation and temperature are done here, in llama.cpp's order:
top-k, top-p, min-p, temperature. Source: `llama_cpp.LogitsProcessor`, a callable (input_ids, scores) -> scores.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from assay.watermark.adapters._embedding import completion_only, embedding_sampler, next_token
from assay.watermark.keys import SecretKey

Scores = npt.NDArray[np.float32]
LogitsProcessor = Callable[[npt.NDArray[np.intc], Scores], Scores]


def for_llama_cpp(
    key: SecretKey,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 0.95,
    min_p: float = 0.05,
    prompt_length: int | None = None,
    seed: int | None = None,
) -> LogitsProcessor:
    """The watermark as a logits processor of one completion.

    Guarantee: over keys of a scheme without distortion the text has the law of llama.cpp's own sampling with these
    settings, repeated contexts included. A pure function of its arguments: calls may repeat or come out of order.

    Parameters
    ----------
    key
        An active key of a scheme that draws token by token.
    temperature
        > 0.
    top_k
        Keep so many of the largest logits; 0 or below keeps all.
    top_p
        In (0, 1]: keep the likeliest tokens until their mass reaches it.
    min_p
        In [0, 1]: keep tokens with at least this share of the largest probability.
    prompt_length
        Tokens of the prompt, as llama.cpp counts them, begin-of-sequence included; needed by schemes that read the
        completion alone.
    seed
        Any integer: keys the unmarked draws. Default: fresh randomness.

    Returns
    -------
    `(input_ids, scores) -> scores`, for `Llama.create_completion(logits_processor=LogitsProcessorList([...]))`. The
    settings of the call itself no longer matter, since one token is left; its penalties do not act at all.

    Raises
    ------
    RevokedKeyError
        If the key is retired or revoked.
    ValueError
        If a setting is out of range, or the scheme needs `prompt_length`.

    Examples
    --------
    >>> mark = for_llama_cpp(SecretKey.generate(), temperature=0.7)
    >>> llm.create_completion(prompt, logits_processor=LogitsProcessorList([mark]))  # doctest: +SKIP
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
        raise ValueError(f"min_p must be in [0, 1], got {min_p}.")
    start = 0
    if completion_only(key):
        if isinstance(prompt_length, bool) or not isinstance(prompt_length, int) or prompt_length < 0:
            raise ValueError(
                f"prompt_length must be given for scheme {key.config.scheme!r}, which reads the completion alone, got "
                f"{prompt_length!r}. Pass len(llm.tokenize(prompt))."
            )
        start = prompt_length

    def mark(input_ids: npt.NDArray[np.intc], scores: Scores) -> Scores:
        kept = truncated(scores, top_k=top_k, top_p=top_p, min_p=min_p) / np.float32(temperature)
        token = next_token(draw, input_ids[start:], kept)
        out = np.full_like(scores, -np.inf)
        out[token] = 0.0
        return out

    return mark


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
