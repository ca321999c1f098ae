"""Token statistics on a GPU against the matrix product they need: python benchmarks/gpu_scoring.py

Needs an NVIDIA GPU (sm_80 or later, 8 GB free), torch with CUDA and triton. Rows of the table that need liger-kernel
(fused linear cross-entropy) or cut-cross-entropy appear where those import. All ways run in one process, interleaved,
median of the rounds by CUDA events; peak memory is what the call allocates over its arguments.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

SHAPES = [(8192, 4096, 128256), (8192, 2048, 128256), (8192, 768, 50257)]
ROWS = 1024  # rows per product, as score_tokens takes them at the largest vocabulary


def product(hidden: torch.Tensor, weight: torch.Tensor, out: torch.dtype) -> None:
    """The chunked product alone: the floor."""
    for start in range(0, len(hidden), ROWS):
        if out == hidden.dtype:
            torch.mm(hidden[start : start + ROWS], weight.T)
        else:
            torch.mm(hidden[start : start + ROWS], weight.T, out_dtype=out)


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability, entropy and varentropy as one writes them first, in chunks of rows so that they fit."""
    out = []
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        log_p = torch.log_softmax((hidden[rows] @ weight.T).float(), dim=1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(1)
        varentropy = (p * log_p * log_p).sum(1) - entropy**2
        out.append(torch.stack([log_p.gather(1, targets[rows, None])[:, 0], entropy, varentropy]))
    return torch.cat(out, dim=1)


def peers(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Fused losses of other projects, which give the log-probability and no other statistic."""
    found: dict[str, Callable[[], object]] = {}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        liger = LigerFusedLinearCrossEntropyFunction.apply
        found["Liger fused linear cross-entropy (log p)"] = lambda: liger(hidden, weight, targets)
    except ImportError:
        print("liger-kernel does not import: its row is left out")
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut cross-entropy (log p)"] = lambda: linear_cross_entropy(hidden, weight, targets, reduction="none")
    except ImportError:
        print("cut-cross-entropy does not import: its row is left out")
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """One call by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def peak(call: Callable[[], object]) -> int:
    """Bytes the call allocates at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def table(rows: int, width: int, vocabulary: int, rounds: int) -> None:
    """Time and memory of every way at one shape."""
    from assay.kernels.scoring.tokens import score_tokens

    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(vocabulary, width, generator=generator, device="cuda") * 3 / width**0.5).bfloat16()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, device="cuda")
    compiled = torch.compile(naive)
    ways: dict[str, Callable[[], object]] = {
        "product, bfloat16 logits": lambda: product(hidden, weight, torch.bfloat16),
        "product, float32 logits": lambda: product(hidden, weight, torch.float32),
        "score_tokens, bfloat16 logits": lambda: score_tokens(hidden, weight, targets, logits_dtype=torch.bfloat16),
        "score_tokens, float32 logits": lambda: score_tokens(hidden, weight, targets),
        "score_tokens, eager torch": lambda: score_tokens(hidden, weight, targets, backend="torch"),
        "naive: log p, entropy, varentropy": lambda: naive(hidden, weight, targets),
        "torch.compile of naive": lambda: compiled(hidden, weight, targets),
        **peers(hidden, weight, targets),
    }
    taken = {name: [] for name in ways}
    for call in ways.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in ways.items():
            taken[name].append(milliseconds(call))
    times = {name: statistics.median(values) for name, values in taken.items()}
    narrow, wide = times["product, bfloat16 logits"], times["product, float32 logits"]
    print(f"\nN={rows} D={width} V={vocabulary}, bfloat16 weights")
    for name, call in ways.items():
        ratios = f"{times[name] / narrow:5.2f}x {times[name] / wide:5.2f}x"
        print(f"  {name:42s} {times[name]:9.2f} ms {ratios} {peak(call) / 1e6:8.0f} MB")


def independence(width: int = 4096, vocabulary: int = 128256) -> None:
    """How far a row's log-probability moves with its batch: cuBLAS chooses other kernels for other shapes."""
    from assay.kernels.scoring.tokens import score_tokens

    hidden = torch.randn(512, width, device="cuda").bfloat16()
    weight = (torch.randn(vocabulary, width, device="cuda") * 3 / width**0.5).bfloat16()
    targets = torch.randint(0, vocabulary, (512,), device="cuda")
    whole = score_tokens(hidden, weight, targets).log_prob
    for rows in (1, 7, 64):
        part = score_tokens(hidden[:rows], weight, targets[:rows]).log_prob
        print(f"a batch of {rows:3d} against 512 rows: log p differs by at most {abs(part - whole[:rows]).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        sys.exit("gpu_scoring.py needs an NVIDIA GPU and torch with CUDA; none is available here.")
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {rounds} rounds")
    print("columns: median time, ratio to the bfloat16 product, ratio to the float32 product, peak memory")
    for shape in SHAPES:
        table(*shape, rounds)
    independence()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
