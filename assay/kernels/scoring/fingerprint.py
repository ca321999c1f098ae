"""What identifies a scorer: its weights, their precision, and how it reads. Other weights, other scores."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def weights_sha256(model: Any) -> str:
    """SHA-256 over all parameters and buffers in order of name: name, type, shape, bytes.

    Parameters
    ----------
    model
        A torch module. Equal weights in another precision give another hash, because they give other scores.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        # A view as bytes: numpy has no bfloat16.
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
