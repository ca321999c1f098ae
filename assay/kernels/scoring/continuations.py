"""Continuations of a prompt, token by token, with the law of every token in the caller's hands.

The caller chooses each token from the law that the decoding rule leaves: at random for power studies, by a keyed real
for the sequence watermark. The model runs with a key-value cache, once per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from assay.kernels.scoring.decoding import Decoding, warp

Choose = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], npt.NDArray[np.int64]]
"""`(ids, log_probs) -> tokens`: ids int64, shape (rows, t), prompt included; log_probs float32, shape (rows, V),
normalised, -inf for a token that must not be drawn; tokens int64, shape (rows,)."""


@torch.inference_mode()
def continuations(
    model: Any,
    prompt: Sequence[int] | npt.NDArray[np.integer[Any]],
    choose: Choose,
    *,
    rows: int,
    tokens: int,
    decoding: Decoding,
    banned: Sequence[int] = (),
    stop: Sequence[int] = (),
) -> npt.NDArray[np.int64]:
    """Texts that continue one prompt.

    Parameters
    ----------
    model
        A transformers causal language model in evaluation mode.
    prompt
        Integers, shape (n,), n >= 1: read by every row.
    choose
        Picks the next token of every row; see `Choose`.
    rows
        Number of texts, >= 1.
    tokens
        Tokens of each text, >= 1.
    decoding
        The rule that turns logits into the law of the next token.
    banned
        Ids that are never drawn; they are removed before the decoding rule, as `min_new_tokens` removes the end of
        sequence.
    stop
        Ids after which a text ends. The run ends when every row has drawn one; a row that ended earlier goes on.

    Returns
    -------
    int64, shape (rows, at most tokens).

    Raises
    ------
    ValueError
        If the prompt is empty, a count is out of range, or prompt and tokens pass what the model can read.
    """
    context = np.asarray(prompt)
    if context.ndim != 1 or len(context) == 0 or not np.issubdtype(context.dtype, np.integer):
        raise ValueError(
            f"prompt must be at least one token id, got shape {context.shape}. Begin with the model's "
            "beginning-of-sequence token where there is no prompt."
        )
    for name, value in (("rows", rows), ("tokens", tokens)):
        if isinstance(value, bool) or value != int(value) or value < 1:
            raise ValueError(f"{name} must be an integer at least 1, got {value}.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(context) + tokens > limit:
        raise ValueError(
            f"tokens must be at most {max(0, limit - len(context))} after a prompt of {len(context)} tokens, got "
            f"{tokens}: the model reads {limit} tokens."
        )
    device = model.get_input_embeddings().weight.device
    ids = np.empty((rows, len(context) + tokens), dtype=np.int64)
    ids[:, : len(context)] = context
    ended = np.zeros(rows, dtype=bool)
    # The prompt is read once; its cache is repeated for the rows.
    out = model(input_ids=torch.from_numpy(ids[:1, : len(context)]).to(device), use_cache=True)
    cache, logits = out.past_key_values, out.logits[:, -1].expand(rows, -1)
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    place = len(context)
    while True:
        ids[:, place] = choose(ids[:, :place], _law(logits, decoding, banned))
        ended |= np.isin(ids[:, place], stop)
        place += 1
        if ended.all() or place == ids.shape[1]:
            return ids[:, len(context) : place]
        step = torch.from_numpy(ids[:, place - 1 : place]).to(device)
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1]


def _law(logits: torch.Tensor, decoding: Decoding, banned: Sequence[int]) -> npt.NDArray[np.float32]:
    """Normalised log-probabilities after the decoding rule, float32 on the CPU."""
    logits = logits.float()
    if len(banned):
        logits = logits.clone()
        logits[:, list(banned)] = -torch.inf
    out: npt.NDArray[np.float32] = torch.log_softmax(warp(logits, decoding), dim=-1).cpu().numpy()
    return out
