"""`score_tokens` and `score_logits`: per-token statistics in one pass over the vocabulary.

The logits of a block of candidates are computed, summed and forgotten: memory does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from assay._errors import MissingDependencyError
from assay.kernels.scoring import running, statistics, statistics_torch, survivors
from assay.kernels.scoring.decoding import Decoding, warp
from assay.kernels.scoring.head import LEAST, Head, Projection, blocks
from assay.kernels.scoring.running import RunningSums
from assay.kernels.scoring.statistics import DEFAULT_TILTS, Floats, TokenStatistics

Backend = Literal["auto", "numba", "torch", "triton"]

_ROWS = 1024  # rows per pass over the weights
# Bytes of logits held at once where whole rows are needed, and of them logits warped at once, which takes a few times
# their memory: 12 MiB and half a MiB of float32 on a CPU; on a GPU half a gigabyte, so that the product has a thousand
# rows.
_WHOLE, _WARPED = 3 << 22, 1 << 17
_WHOLE_GPU, _WARPED_GPU = 1 << 29, 1 << 25


@dataclass(frozen=True, eq=False)
class _Law:
    """What is asked of every row; `numbers` of rows, where they are passed along, are their places in the call."""

    rule: Decoding
    grid: Floats
    backend: Backend


@torch.inference_mode()
def score_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    decoding: Decoding | None = None,
    tilts: Sequence[float] = DEFAULT_TILTS,
    other_logits: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> TokenStatistics:
    """Statistics of the law each row of logits gives its target.

    A row's statistics do not depend on the other rows, bit for bit.

    Parameters
    ----------
    logits
        float32, bfloat16 or float16, shape (n, V); -inf forbids a candidate.
    targets
        Integers, shape (n,), in [0, V).
    decoding
        The decoding rule; None is plain sampling at temperature 1.
    tilts
        The grid s of the tilted log-sums, each below 1.
    other_logits
        Floating, shape (n, V): a second model's logits q for the cross-entropy; the decoding rule leaves them alone.
    backend
        "auto" takes numba on the CPU and Triton on a GPU that has it, else torch.

    Returns
    -------
    `TokenStatistics` of n rows, float64 on the CPU.

    Raises
    ------
    ValueError
        On shapes that do not fit, targets out of range, NaN or +inf logits, or a row of -inf.
    """
    _check_rows("logits", logits, targets)
    if other_logits is not None and other_logits.shape != logits.shape:
        raise ValueError(f"other_logits must have shape {tuple(logits.shape)}, got {tuple(other_logits.shape)}.")
    grid = _grid(tilts)
    _check_targets(targets, logits.shape[1])
    law = _Law(decoding or Decoding(), grid, backend)
    return _in_memory(logits, other_logits, targets, law, np.arange(len(logits)))


@torch.inference_mode()
def score_tokens(
    hidden: torch.Tensor,
    head: Head | torch.Tensor,
    targets: torch.Tensor,
    *,
    decoding: Decoding | None = None,
    tilts: Sequence[float] = DEFAULT_TILTS,
    other: tuple[torch.Tensor, Head] | None = None,
    logits_dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> TokenStatistics:
    """Statistics of each target under the law that its hidden state gives, without keeping the logits.

    A row's statistics do not depend on the other rows: bit for bit on the CPU with numba, on BLAS libraries whose
    products do not (`tests` check it).

    Parameters
    ----------
    hidden
        Floating, shape (n, D): last hidden states, after the final normalisation.
    head
        The vocabulary projection, or its weight alone, shape (V, D).
    targets
        Integers, shape (n,), in [0, V).
    decoding, tilts, backend
        As in `score_logits`. With numba a rule with top-k, or with min-p alone, keeps the few logits of each row that
        can survive; top-p alone needs whole rows, 12 MiB at a time.
    other
        The second model's hidden states, shape (n, D2), and head over the same vocabulary.
    logits_dtype
        float32 multiplies narrower weights in float32. The weights' own type is several times faster where the
        processor has it, rounds every logit to that type, and gives the logits that a model of that type samples from.

    Returns
    -------
    `TokenStatistics` of n rows, float64 on the CPU.

    Raises
    ------
    ValueError
        As `score_logits`.
    """
    head = head if isinstance(head, Head) else Head(weight=head)
    _check_rows("hidden", hidden, targets)
    _check_head("head.weight", head, hidden)
    vocabulary = len(head.weight)
    _check_targets(targets, vocabulary)
    if other is not None:
        _check_head("other head.weight", other[1], other[0])
        if len(other[0]) != len(hidden) or len(other[1].weight) != vocabulary:
            raise ValueError(
                f"other must have {len(hidden)} rows and {vocabulary} candidates, got {len(other[0])} and "
                f"{len(other[1].weight)}. The two models must share their vocabulary."
            )
    grid = _grid(tilts)
    out = statistics.empty(len(hidden), grid, cross=other is not None)
    rule = decoding or Decoding()
    law = _Law(rule, grid, backend)
    step, by = _way(hidden, head, law, logits_dtype, alone=other is None)
    memory: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for start in range(0, len(hidden), step):
        rows = slice(start, min(start + step, len(hidden)))
        first = Projection(hidden[rows], head, logits_dtype, memory[0])
        second = None if other is None else Projection(other[0][rows], other[1], logits_dtype, memory[1])
        statistics.fill(out, rows, by(first, second, targets[rows], law, np.arange(rows.start, rows.stop)))
    return out


Numbers = npt.NDArray[np.int64]
Way = Callable[[Projection, Projection | None, torch.Tensor, _Law, Numbers], TokenStatistics]


def _way(hidden: torch.Tensor, head: Head, law: _Law, logits_dtype: torch.dtype, *, alone: bool) -> tuple[int, Way]:
    """How rows are scored, and how many at once."""
    way, vocabulary = _backend(law.backend, hidden), len(head.weight)
    if way != "triton" and not law.rule.truncates:
        return _ROWS, _blockwise
    if way == "numba" and alone and (rows := survivors.rows_at_once(law.rule, vocabulary, _ROWS)):
        return rows, _collected
    size = logits_dtype.itemsize if logits_dtype == head.weight.dtype else 4
    return max(LEAST, (_WHOLE_GPU if hidden.is_cuda else _WHOLE) // (vocabulary * size)), _held


def _held(
    first: Projection, second: Projection | None, targets: torch.Tensor, law: _Law, numbers: Numbers
) -> TokenStatistics:
    """All logits of the rows held at once."""
    return _in_memory(first.whole(), None if second is None else second.whole(), targets, law, numbers)


def _collected(
    first: Projection, second: Projection | None, targets: torch.Tensor, law: _Law, numbers: Numbers
) -> TokenStatistics:
    """The survivors collected in one pass over the vocabulary, then a few whole rows at a time."""
    rule, vocabulary = law.rule, len(first.head.weight)
    out = statistics.empty(first.rows, law.grid)
    targets = targets.to(torch.int64)
    held = survivors.collect(first, rule)
    enough, more = np.flatnonzero(held.counts >= 0), np.flatnonzero(held.counts < 0)
    step = max(1, _WARPED // vocabulary)
    memory = torch.empty((min(step, len(enough)), vocabulary))
    for start in range(0, len(enough), step):
        index = enough[start : start + step]
        whole = survivors.whole_rows(held.rows(index), rule, targets[index], memory[: len(index)])
        statistics.fill(out, index, _whole_rows(whole, None, targets[index], law, numbers[index]))
    step = max(LEAST, _WHOLE // (4 * vocabulary))
    for start in range(0, len(more), step):
        index = more[start : start + step]
        again = Projection(first.hidden[index], first.head, first.dtype)
        statistics.fill(out, index, _held(again, None, targets[index], law, numbers[index]))
    return out


def _in_memory(
    logits: torch.Tensor, other: torch.Tensor | None, targets: torch.Tensor, law: _Law, numbers: Numbers
) -> TokenStatistics:
    """Statistics of rows of logits of any type, before the decoding rule."""
    if _backend(law.backend, logits) == "triton" and not law.rule.truncates:
        from assay.kernels.scoring import triton_statistics

        return triton_statistics.row_statistics(
            logits, targets, law.grid, other, temperature=law.rule.temperature, numbers=numbers
        )
    out = statistics.empty(len(logits), law.grid, cross=other is not None)
    targets = targets.to(logits.device, torch.int64)
    size = _WARPED_GPU if logits.is_cuda else _WARPED if law.rule.truncates else 8 * _WARPED
    step = max(1, size // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        # Which of two tied candidates stays is seen by the target and by another model's law only.
        whole = warp(logits[rows], law.rule, targets[rows] if other is None else None)
        beside = None if other is None else other[rows].float()
        statistics.fill(out, rows, _whole_rows(whole, beside, targets[rows], law, numbers[rows]))
    return out


def _blockwise(
    first: Projection, second: Projection | None, targets: torch.Tensor, law: _Law, numbers: Numbers
) -> TokenStatistics:
    """One pass over the vocabulary, each block of logits summed and forgotten."""
    grid, temperature = law.grid, law.rule.temperature
    add = _adder(law.backend, first.hidden)
    tempered = first.chosen(targets) / temperature
    sums = running.start(targets.cpu().numpy().astype(np.int64), tempered.cpu().numpy(), grid)
    vocabulary = len(first.head.weight)

    # The numba pass reads bfloat16 as it is.
    widen = add is statistics_torch.update or temperature != 1.0 or first.hidden.dtype != torch.bfloat16

    def pass_over(into: RunningSums, source: Projection, beside: Projection | None) -> None:
        for block in blocks(vocabulary):
            logits = source.logits(block, widen=widen)
            if temperature != 1.0:
                logits.div_(temperature)
            add(into, slice(0, source.rows), logits, block.start, None if beside is None else beside.logits(block))

    pass_over(sums, first, second)
    # A rank is exact only against the logit that the pass itself computed. Where the early product gave other bits,
    # those rows are counted again.
    wrong = np.flatnonzero(sums.seen.view(np.int32) != sums.chosen.view(np.int32))
    wrong = wrong[~np.isnan(sums.seen[wrong])]
    if len(wrong):
        again = running.start(sums.targets[wrong], sums.seen[wrong], grid)
        kept = torch.from_numpy(wrong).to(first.hidden.device)
        pass_over(again, Projection(first.hidden[kept], first.head, first.dtype), None)
        for name in ("chosen", "greater", "ties"):
            getattr(sums, name)[wrong] = getattr(again, name)
    return running.finish(sums, grid, cross=second is not None, numbers=numbers)


def _whole_rows(
    logits: torch.Tensor, other: torch.Tensor | None, targets: torch.Tensor, law: _Law, numbers: Numbers
) -> TokenStatistics:
    """Statistics of whole rows of float32 logits, after the decoding rule."""
    if _backend(law.backend, logits) == "triton":
        from assay.kernels.scoring import triton_statistics

        return triton_statistics.row_statistics(logits, targets, law.grid, other, numbers=numbers)
    chosen = logits.gather(1, targets[:, None])[:, 0]
    sums = running.start(targets.cpu().numpy(), chosen.cpu().numpy(), law.grid)
    add = _adder(law.backend, logits)
    add(sums, slice(0, len(logits)), logits.contiguous(), 0, None if other is None else other.contiguous())
    return running.finish(sums, law.grid, cross=other is not None, numbers=numbers)


Adder = Callable[[RunningSums, slice, torch.Tensor, int, torch.Tensor | None], None]


def _adder(backend: Backend, tensor: torch.Tensor) -> Adder:
    if _backend(backend, tensor) != "numba":
        return statistics_torch.update
    from assay.kernels.scoring import statistics_numba

    def add(sums: RunningSums, rows: slice, logits: torch.Tensor, offset: int, other: torch.Tensor | None) -> None:
        beside = None if other is None else other.numpy()
        columns = slice(0, logits.shape[1])
        bits = logits.view(torch.uint16) if logits.dtype == torch.bfloat16 else logits
        statistics_numba.update(sums, rows, bits.numpy(), columns, offset, beside, torch.get_num_threads())

    return add


def _backend(backend: Backend, tensor: torch.Tensor) -> Literal["numba", "torch", "triton"]:
    if backend not in ("auto", "numba", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'numba', 'torch' or 'triton', got {backend!r}.")
    if backend == "auto":
        if tensor.device.type == "cpu":
            return "numba"
        from importlib.util import find_spec

        return "triton" if tensor.device.type == "cuda" and find_spec("triton") else "torch"
    if backend == "triton" and tensor.device.type == "cpu":
        _check_interpreter()
    if backend == "numba" and tensor.device.type != "cpu":
        raise ValueError(f"backend 'numba' needs tensors on the CPU, got {tensor.device}. Use 'auto'.")
    return backend


def _check_interpreter() -> None:
    try:
        from assay.kernels.triton_sampling import INTERPRETED
    except ImportError as error:
        raise MissingDependencyError("backend 'triton' needs the package triton. Use 'auto'.") from error
    if not INTERPRETED:
        raise ValueError("backend 'triton' needs tensors on a GPU, got cpu. Use 'auto'.")


def _grid(tilts: Sequence[float]) -> Floats:
    grid = np.asarray(tilts, dtype=np.float64).reshape(-1)
    if not (np.isfinite(grid).all() and (grid < 1).all()):
        raise ValueError(f"tilts must be finite and below 1, got {list(tilts)}.")
    return grid


def _check_rows(name: str, rows: torch.Tensor, targets: torch.Tensor) -> None:
    if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise ValueError(f"{name} must be floating with shape (n, size >= 1), got {tuple(rows.shape)} {rows.dtype}.")
    if targets.shape != rows.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"targets must be integers of shape ({len(rows)},), got {tuple(targets.shape)} {targets.dtype}."
        )


def _check_head(name: str, head: Head, hidden: torch.Tensor) -> None:
    weight = head.weight
    if weight.ndim != 2 or hidden.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{name} must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}.")


def _check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < vocabulary):
        raise ValueError(
            f"targets must be ids in [0, {vocabulary}), got {int(targets.min())} to {int(targets.max())}. "
            "Use the tokenizer that belongs to the model."
        )
