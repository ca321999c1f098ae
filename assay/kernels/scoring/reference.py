"""The definitions of every statistic, row by row of full logits in float64: slow, plain, the yardstick of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from assay.kernels.scoring.statistics import Floats, TokenStatistics

if TYPE_CHECKING:
    import torch


def row_statistics(
    logits: torch.Tensor, targets: torch.Tensor, tilts: Floats, other_logits: torch.Tensor | None = None
) -> TokenStatistics:
    """Statistics of softmax(logits).

    Parameters
    ----------
    logits
        Floating, shape (n, V); -inf forbids a candidate.
    targets
        int64, shape (n,).
    tilts
        float64, shape (t,).
    other_logits
        Floating, shape (n, V): logits of the second model, for the cross-entropy.
    """
    import torch

    chosen = logits.gather(1, targets[:, None])
    log_p = torch.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    surprisal = torch.where(p > 0, -log_p, 0.0)
    entropy = (p * surprisal).sum(1)
    deviation = surprisal - entropy[:, None]
    tilted = [torch.logsumexp((1 - s) * log_p, dim=1) for s in tilts]
    cross = None
    if other_logits is not None:
        log_q = torch.log_softmax(other_logits.double(), dim=1)
        cross = torch.where(p > 0, -p * log_q, 0.0).sum(1).numpy()
    return TokenStatistics(
        log_prob=log_p.gather(1, targets[:, None])[:, 0].numpy(),
        entropy=entropy.numpy(),
        varentropy=(p * deviation**2).sum(1).numpy(),
        third_moment=(p * deviation**3).sum(1).numpy(),
        rank=1 + (logits > chosen).sum(1).numpy(),
        ties=(logits == chosen).sum(1).numpy() - 1,
        max_log_prob=log_p.amax(1).numpy(),
        tilts=tilts,
        tilted_log_sums=torch.stack(tilted, dim=1).numpy() if tilted else np.empty((len(log_p), 0)),
        scored=np.ones(len(log_p), dtype=np.bool_),
        cross_entropy=cross,
    )
