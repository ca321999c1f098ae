"""Draws from logits that an engine holds on a GPU: races are run there, and only their subkeys cross."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from assay.kernels import torch_race
from assay.watermark.adapters._chance import Watched

Draw = tuple[Watched, npt.NDArray[np.int64], int | None]
"""How some rows draw, their histories, int64, shape (rows, t), and the id that pads these on the left."""


def raced(draws: Sequence[Draw], scores: torch.Tensor) -> torch.Tensor | None:
    """Tokens of rows that are drawn where their scores are; None where they must be drawn on the CPU.

    Parameters
    ----------
    draws
        For consecutive rows of `scores`, all of them.
    scores
        Floating, shape (n, V), after temperature and truncation.

    Returns
    -------
    int64, shape (n,), on the device of `scores`, or None: the scores are on no GPU that can race, or a scheme's draw is
    not one race per row.
    """
    if not torch_race.on_device(scores):
        return None
    keys = []
    for draw, ids, pad_token_id in draws:
        if draw.race_keys is None:
            return None
        keys.append(draw.race_keys(ids, pad_token_id))
    tokens = torch_race.winners(np.concatenate(keys), scores)
    if not all(draw.judged for draw, _, _ in draws):
        drawn = -torch.log_softmax(scores.float(), dim=1).gather(1, tokens[:, None])[:, 0].double().cpu().numpy()
        start = 0
        for draw, ids, _ in draws:
            if not draw.judged:
                draw.judge(ids.shape[1], drawn[start : start + len(ids)])
            start += len(ids)
    return tokens
