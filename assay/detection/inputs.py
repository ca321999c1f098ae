"""What the arguments of `detect` stand for: a scorer, token ids, and what a model says of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from assay.detection.model_view import ModelView
from assay.detection.text import LoadedTokenizer, decode_text, load_tokenizer
from assay.kernels.chacha import Words
from assay.watermark.gumbel import token_ids

if TYPE_CHECKING:
    from assay.kernels.scoring.model import ModelScorer


def scorer_of(model: Any) -> ModelScorer:
    """A scorer of a model given as a folder, hub id, "default", loaded model or scorer."""
    from assay.kernels.scoring.model import ModelScorer

    if isinstance(model, ModelScorer):
        return model
    from assay.models import load_model

    return ModelScorer(load_model(model))


def model_view_of(scorer: ModelScorer, ids: Words, prompt_ids: Words | None, decoding: dict[str, Any]) -> ModelView:
    """What a model says of the tokens of a text after a prompt, under a decoding rule; the model runs when asked.

    Raises
    ------
    ValueError
        If the decoding rule is out of range.
    """
    from assay.kernels.scoring.decoding import Decoding

    Decoding(**decoding)  # now, and not when the first test asks

    def score() -> npt.NDArray[np.float64]:
        (statistics,) = scorer.score([ids], prompt=None if prompt_ids is None else [prompt_ids], **decoding)
        return statistics.log_prob

    return ModelView(score, partial(scorer.log_probabilities, ids, prompt=prompt_ids, **decoding))


def token_ids_of(
    text: Any, name: str, tokenizer: Any, model: Any, scorer: ModelScorer | None
) -> tuple[Words, LoadedTokenizer | None]:
    """Token ids of a text or, with the name "prompt", of a prompt; and the tokenizer that made them, if one did.

    Raises
    ------
    TextError
        If it is not valid Unicode or the bytes are not UTF-8.
    ValueError
        If it is neither text nor ids, an id is out of range, or no tokenizer is known; the message names the argument.
    """
    if isinstance(text, (bytes, bytearray)):
        text = decode_text(bytes(text))
    if not isinstance(text, str):
        if not isinstance(text, Iterable) or isinstance(text, (dict, set)):
            raise ValueError(f"{name} must be a string, UTF-8 bytes or token ids, got {type(text).__name__}.")
        try:
            return token_ids(cast("npt.ArrayLike", text)), None
        except ValueError as error:
            raise ValueError(str(error).replace("tokens must be", f"{name} must be", 1)) from None
    if tokenizer is None:
        tokenizer = getattr(scorer, "tokenizer", None)
    if tokenizer is None and isinstance(model, (str, os.PathLike)):
        tokenizer = model
    if tokenizer is None and model is not None:
        # A model loaded by transformers remembers the folder or hub id, where its tokenizer is too.
        tokenizer = getattr(getattr(scorer, "model", model), "name_or_path", None) or None
    if tokenizer is None and model is not None:
        raise ValueError(f"tokenizer must be given with a loaded model to test {name} as a string. Or pass token ids.")
    loaded = load_tokenizer(tokenizer)
    return loaded.encode_prompt(text) if name == "prompt" else loaded.encode(text), loaded
