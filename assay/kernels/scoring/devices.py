"""Devices for models that processes share out: the GPUs there are, whether one can be used, types by their names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from assay._errors import MissingDependencyError

if TYPE_CHECKING:
    import torch


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, each fit for a worker's CUDA_VISIBLE_DEVICES; none without torch.

    No GPU is touched: torch counts them through the driver's library, and the memory of a context stays the workers'.
    """
    try:
        import torch
    except ImportError:
        return []
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(place) for place in range(count)] if named is None else [name.strip() for name in named.split(",")]
    return names[:count]


def check_usable(device: str) -> None:
    """Refuse a device that this process cannot use.

    Parameters
    ----------
    device
        "cpu" or "cuda".

    Raises
    ------
    MissingDependencyError
        Without torch.
    ValueError
        If torch cannot use the GPU that the process was given.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("Models need torch and transformers: pip install 'assay[models]'.") from error
    if device == "cuda" and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        raise ValueError(
            f"device: a worker was given a GPU (CUDA_VISIBLE_DEVICES={visible!r}) that its torch {torch.__version__} "
            "cannot use. Install a torch for that GPU on every machine, or choose device='cpu'."
        )


def dtype_of(name: str) -> torch.dtype:
    """The torch type of a name such as "float32"."""
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"name must be that of a torch type such as 'float32', got {name!r}.")
    return found
