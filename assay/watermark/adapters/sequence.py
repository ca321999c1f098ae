"""The sequence watermark with a transformers model: its own loop, because a token depends on all laws before it.

`generate` with a logits processor will not do: the processors see histories and scores of one step, and a pure function
of these cannot know the interval that the earlier laws have left. Law of the text: the model's after the decoding rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from assay._errors import MissingDependencyError, RevokedKeyError
from assay.watermark.adapters._chance import Watched, check_candidates
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.sequence import SequenceDecoder, config_of

try:
    from assay.kernels.scoring.continuations import continuations
    from assay.kernels.scoring.decoding import Decoding
except ImportError as error:
    raise MissingDependencyError(
        "Generating needs torch and transformers. Install them with: pip install 'assay[models]'"
    ) from error


def generate_sequence(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int] | npt.NDArray[np.integer[Any]],
    key: SecretKey,
    nonce: bytes,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> npt.NDArray[np.int64]:
    """A text that carries the sequence watermark.

    Guarantee: over keys or nonces the text has the law of plain sampling with the same settings, up to 2**-52 per
    token probability.

    Parameters
    ----------
    model
        A transformers causal language model in evaluation mode.
    tokenizer
        Its tokenizer; may be None where the prompt is ids.
    prompt
        A string or token ids, shape (n,), n >= 1.
    key
        An active key of scheme "sequence".
    nonce
        At least 8 bytes that no other text under this key has. Keep it with the text: detection needs it. Two texts
        under one nonce share their reals; with one prompt they are the same text.
    max_new_tokens
        Largest length; the text ends earlier with an end-of-sequence token.
    temperature, top_k, top_p, min_p
        The decoding rule; top_k above 1 and min_p below 1.

    Returns
    -------
    int64, shape (at most max_new_tokens,): the new tokens, an end-of-sequence token included.

    Raises
    ------
    RevokedKeyError
        If the key is retired or revoked.
    ValueError
        If the key is of another scheme, the nonce is short, or an argument is out of range.

    Warns
    -----
    WeakMarkWarning
        If the first 64 tokens were all but decided, as by a temperature near 0, so that hardly a mark is in them.
    """
    config = config_of(key)
    if key.state != "active":
        raise RevokedKeyError(
            f"key {key.id!r} is {key.state}: it may not embed. Use an active key, or make one with `assay keys rotate`."
        )
    check_candidates(top_k=top_k, min_p=min_p)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("tokenizer must be given with a prompt that is a string. Or pass token ids.")
        prompt_ids: Sequence[int] | npt.NDArray[np.integer[Any]] = tokenizer(prompt)["input_ids"]
    else:
        prompt_ids = prompt
    ends = model.generation_config.eos_token_id
    texts = continuations(
        model,
        prompt_ids,
        Watched(SequenceDecoder(use_key(key), [nonce], config)),
        rows=1,
        tokens=max_new_tokens,
        decoding=Decoding(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        stop=[] if ends is None else np.atleast_1d(ends).tolist(),
    )
    return np.asarray(texts[0], dtype=np.int64)
