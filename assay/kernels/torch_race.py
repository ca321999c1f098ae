"""The keyed race of logits that are tensors, run where they are: in Triton on a GPU, else by `race`.

A serving engine's logits stay on the card: what crosses is one subkey per row one way and nothing the other.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch

from assay.kernels import race
from assay.kernels.chacha import Words

Backend = Literal["auto", "numba", "triton"]


def on_device(logits: torch.Tensor) -> bool:
    """Whether "auto" races these logits in Triton."""
    return logits.is_cuda and torch.version.cuda is not None and find_spec("triton") is not None


def winners(keys: Words, logits: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Winner of the keyed race of each row; see `race.winners`.

    Parameters
    ----------
    keys
        uint32, shape (n, 8): one subkey per row.
    logits
        Floating, shape (n, V), after temperature and truncation; -inf never wins.
    backend
        "auto" takes Triton on an NVIDIA GPU that has it, else numba on the CPU. The words of the race are the same;
        winners may differ where the best two scores lie within about 1e-5.

    Returns
    -------
    int64, shape (n,), on the device of `logits`.

    Raises
    ------
    ValueError
        If a row contains NaN or +inf, or nothing but -inf, or shapes do not fit.
    """
    if backend == "numba" or (backend == "auto" and not on_device(logits)):
        return torch.from_numpy(race.winners(keys, as_array(logits))).to(logits.device)
    from assay.kernels import triton_sampling

    words = torch.from_numpy(keys.view(np.int32)).to(logits.device)
    found = triton_sampling.winners(words, logits.contiguous(), truncated=True)
    if bool((found < 0).any()):
        raise race.unusable_row(as_array(logits), found.cpu().numpy())
    return found


def as_array(logits: torch.Tensor) -> race.LogWeights:
    """The logits on the CPU, without a copy where they are float32 or float64 and there already."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    array: race.LogWeights = logits.numpy(force=True)
    return array
