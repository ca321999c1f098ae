"""Token statistics on the CPU against the bare matrix product they need: python benchmarks/scoring_cpu.py

One thread, process CPU time (other load changes it little), ways interleaved, best of the rounds; peak memory is the
process's own high-water mark over what it held before the call. Pin it to one core: taskset -c 1 python ...
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from assay.kernels.scoring.decoding import Decoding
from assay.kernels.scoring.tokens import score_tokens

SHAPES = [(1024, 768, 50257), (256, 2048, 128256)]
COLUMNS = 2048


def bare_product(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """The chunked product alone, into reused memory: the floor."""
    buffer = torch.empty((len(hidden), COLUMNS), dtype=hidden.dtype)
    for start in range(0, len(weight), COLUMNS):
        block = weight[start : start + COLUMNS]
        torch.mm(hidden, block.T, out=buffer[:, : len(block)])


def upcast_product(hidden: torch.Tensor, weight: torch.Tensor, precision: str = "highest") -> None:
    """The chunked float32 product of narrow factors, each block of weights widened once: the floor of exact logits."""
    wide, copy = hidden.float(), torch.empty((COLUMNS, hidden.shape[1]))
    buffer = torch.empty((len(hidden), COLUMNS))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    for start in range(0, len(weight), COLUMNS):
        block = weight[start : start + COLUMNS]
        torch.mm(wide, copy[: len(block)].copy_(block).T, out=buffer[:, : len(block)])
    torch.set_float32_matmul_precision(before)


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Log-probability, entropy and varentropy as one writes them first."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
    log_p.gather(1, targets[:, None])
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    ((p * log_p * log_p).sum(1) - entropy**2).clamp_min(0)


def transformers_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """What a transformers model computes for `labels=`: the mean log-probability and nothing else."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = (hidden @ weight.T)[None]
    ForCausalLMLoss(logits, None, len(weight), shift_labels=targets[None])


def peak_bytes(call: Callable[[], None]) -> int | None:
    """Growth of the resident set's high-water mark during the call; None where the system does not tell (not Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else memory that earlier calls freed would be reused unseen
    held = _status_kb(status, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return (_status_kb(status, "VmHWM") - held) * 1024


def _status_kb(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{processor()}, torch {torch.__version__}, one thread, best of {rounds} interleaved rounds, CPU seconds")
    for rows, width, vocabulary in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.randn(rows, width).to(dtype)
            weight = (torch.randn(vocabulary, width) * 3 / width**0.5).to(dtype)
            targets = torch.randint(0, vocabulary, (rows,))
            table(hidden, weight, targets, rounds)


def table(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rounds: int) -> None:
    dtype = weight.dtype
    rules = {
        "T=0.8 top-k 50 top-p 0.95": Decoding(temperature=0.8, top_k=50, top_p=0.95),
        "top-p 0.95": Decoding(top_p=0.95),
        "min-p 0.05": Decoding(min_p=0.05),
    }
    ways: dict[str, Callable[[], object]] = {
        "bare product, in blocks": lambda: bare_product(hidden, weight),
        "score_tokens": lambda: score_tokens(hidden, weight, targets, logits_dtype=dtype),
        "score_tokens, no tilts": lambda: score_tokens(hidden, weight, targets, logits_dtype=dtype, tilts=()),
        "score_tokens, eager torch": lambda: score_tokens(hidden, weight, targets, logits_dtype=dtype, backend="torch"),
        **{
            f"score_tokens, {name}": lambda rule=rule: score_tokens(
                hidden, weight, targets, logits_dtype=dtype, decoding=rule
            )
            for name, rule in rules.items()
        },
        "naive: log p, entropy, varentropy": lambda: naive(hidden, weight, targets),
        "transformers loss: mean log p only": lambda: transformers_loss(hidden, weight, targets),
    }
    if dtype != torch.float32:
        ways["float32 product of widened blocks"] = lambda: upcast_product(hidden, weight)
        ways["the same, torch's precision 'medium'"] = lambda: upcast_product(hidden, weight, "medium")
        ways["score_tokens, float32 logits (default)"] = lambda: score_tokens(hidden, weight, targets)
    best = dict.fromkeys(ways, float("inf"))
    peak: dict[str, int | None] = {}
    for call in ways.values():
        call()
    for _ in range(rounds):
        for name, call in ways.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    for name, call in ways.items():
        peak[name] = peak_bytes(lambda call=call: call() and None)
    floor = best["bare product, in blocks"]
    print(f"\nN={len(hidden)} D={hidden.shape[1]} V={len(weight)} {str(dtype).removeprefix('torch.')}")
    for name in ways:
        memory = "" if peak[name] is None else f"{peak[name] / 1e6:8.0f} MB"
        print(f"  {name:42s} {best[name]:7.3f} s  {best[name] / floor:5.2f}x {memory}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
