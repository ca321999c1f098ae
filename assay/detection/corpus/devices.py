"""GPUs of this machine, as processes are told of them."""

from __future__ import annotations

import os


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
