"""The vocabulary projection: hidden states times pieces of the weights, into memory that is reused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

_COLUMNS = 2048  # candidates per block: 1024 rows x 2048 float32 is 8 MiB and stays in the last-level cache
# BLAS multiplies matrices of fewer rows or columns by other kernels, whose last bits differ; from 16 on each entry's
# bits depend on its row and column alone (measured on MKL and oneDNN, and tested).
LEAST = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """How hidden states become logits: z = scale * (hidden @ weight.T + bias), then soft_cap * tanh(z / soft_cap).

    Attributes
    ----------
    weight
        float32, bfloat16 or float16, shape (V, D).
    bias
        Floating, shape (V,), or None.
    scale
        Factor of the logits.
    soft_cap
        Bound of the logits, > 0, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None


class Projection:
    """Hidden states of a block of rows, ready to be multiplied by pieces of the weights into reused memory.

    `memory` is what an earlier projection of the same head and type used, to be used again once its logits are not.
    """

    def __init__(
        self, hidden: torch.Tensor, head: Head, dtype: torch.dtype, memory: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.head, self.rows, self.dtype = head, len(hidden), dtype
        # Rows of zeros up to the least size at which a row's bits no longer depend on the number of rows.
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, max(0, LEAST - len(hidden))))
        # On a GPU narrow factors give a float32 product without float32 copies of them.
        self._mixed = hidden.is_cuda and hidden.dtype == head.weight.dtype != dtype
        self.hidden = padded if self._mixed else padded.to(dtype if dtype == head.weight.dtype else torch.float32)
        self._buffers = {} if memory is None else memory

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # Memory that is touched for the first time costs more than the product that is written to it.
        size = int(np.prod(shape))
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = torch.empty(size, dtype=dtype, device=self.hidden.device)
        return held[:size].view(shape)

    def logits(self, candidates: slice | torch.Tensor, *, widen: bool = True) -> torch.Tensor:
        """float32, or as multiplied, shape (rows, candidates), C-contiguous; valid until the next call."""
        weight = self.head.weight[candidates]
        count = len(weight)
        if count < LEAST:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, LEAST - count))
        product = self._product(weight)
        used = product[: self.rows, :count]
        if self.head.bias is not None:
            used += self.head.bias[candidates]
        if self.head.scale != 1.0:
            used *= self.head.scale
        if self.head.soft_cap is not None:
            used.div_(self.head.soft_cap).tanh_().mul_(self.head.soft_cap)
        if widen and used.dtype != torch.float32:
            return self._buffer("float", tuple(used.shape), torch.float32).copy_(used)
        return used.contiguous()

    def whole(self) -> torch.Tensor:
        """All candidates' logits as multiplied, shape (rows, V), C-contiguous; valid until the next call."""
        vocabulary = len(self.head.weight)
        if self.hidden.device.type != "cpu":
            return self.logits(slice(0, vocabulary), widen=False)
        # In blocks: one product over all candidates takes half as long again, and float32 copies of all weights at once
        # could be larger than anything else.
        out = self._buffer("whole", (self.rows, vocabulary), self.hidden.dtype)
        for block in blocks(vocabulary):
            out[:, block] = self.logits(block, widen=False)
        return out

    def _product(self, weight: torch.Tensor) -> torch.Tensor:
        if self._mixed:
            return torch.mm(self.hidden, weight.T, out_dtype=torch.float32)
        if weight.dtype != self.hidden.dtype:
            weight = self._buffer("weight", tuple(weight.shape), self.hidden.dtype).copy_(weight)
        product = self._buffer("product", (len(self.hidden), len(weight)), self.hidden.dtype)
        torch.mm(self.hidden, weight.T, out=product)
        return product

    def chosen(self, targets: torch.Tensor) -> torch.Tensor:
        """The targets' logits, shape (rows,): a few square products, bit-equal to the blocks' where BLAS allows it."""
        out = torch.empty(self.rows, device=self.hidden.device)
        step = 64
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            part = Projection(self.hidden[rows], self.head, self.dtype)
            out[rows] = part.logits(targets[rows]).diagonal()
        return out


def blocks(vocabulary: int) -> Iterator[slice]:
    """Blocks of candidates, none narrower than the least size unless the vocabulary is."""
    edges = list(range(0, vocabulary, _COLUMNS))
    if len(edges) > 1 and vocabulary - edges[-1] < LEAST:
        edges.pop()
    yield from (slice(a, b) for a, b in zip(edges, [*edges[1:], vocabulary], strict=True))
