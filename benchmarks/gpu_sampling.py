"""The keyed sampler on a GPU against the bandwidth of reading its logits: python benchmarks/gpu_sampling.py

Needs an NVIDIA GPU (sm_80 or later), torch with CUDA and triton. The bandwidth is that of a large device copy in the
same run; the words are checked against numpy first. Interleaved, median of the rounds by CUDA events.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import numpy as np
import torch
from gpu_scoring import milliseconds

from assay.kernels import chacha
from assay.watermark.adapters._embedding import embedding_sampler
from assay.watermark.adapters.transformers import _KeyedProcessor
from assay.watermark.keys import SecretKey

KEY = np.arange(8, dtype=np.uint32)
ROUNDS_PER_TIMING = 10  # calls per pair of events: one call is near the resolution of an event


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second that a copy of one gigabyte reads and writes."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    taken = statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(rounds))
    return 2 * source.numel() * 4 / taken * 1e3


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """The call, several times."""

    def run() -> None:
        for _ in range(ROUNDS_PER_TIMING):
            call()

    return run


def table(rows: int, vocabulary: int, kept: int | None, bandwidth: float, rounds: int) -> None:
    """Time of every way on one shape; with `kept`, on logits of which top-k left so many."""
    from assay.kernels import triton_chacha, triton_sampling

    contexts = np.random.default_rng(rows).integers(0, vocabulary, (rows, 4)).astype(np.uint32)
    keys = triton_chacha.subkeys(KEY, contexts, "cuda")
    logits = torch.randn(rows, vocabulary, device="cuda")
    if kept is not None:
        logits = logits.masked_fill(logits < logits.topk(kept).values[:, -1:], -torch.inf)
    check(keys, contexts, logits)
    ids = torch.randint(0, vocabulary, (rows, 512), device="cuda")
    step = _KeyedProcessor(embedding_sampler(SecretKey.generate("benchmark"), b"benchmark"), None)
    ways: dict[str, Callable[[], object]] = {
        "keyed sampler, whole rows": lambda: triton_sampling.winners(keys, logits),
        "keyed sampler, survivors": lambda: triton_sampling.winners(keys, logits, truncated=True),
        "transformers' marked step": lambda: step(ids, logits),
        "softmax + multinomial": lambda: torch.multinomial(torch.softmax(logits, dim=1), 1),
        "logits clone": lambda: logits.clone(),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    for _ in range(rounds):
        for name, call in ways.items():
            taken[name].append(milliseconds(repeated(call)) / ROUNDS_PER_TIMING)
    print(f"\nV={vocabulary} rows={rows}, float32 logits, {'all candidates' if kept is None else f'top-k {kept}'}")
    for name, values in taken.items():
        time = statistics.median(values)
        share = logits.numel() * 4 / (time * 1e-3) / bandwidth
        print(f"  {name:26s} {time * 1e3:9.1f} us   reading the logits at {100 * share:5.1f} % of the copy's rate")


def check(keys: torch.Tensor, contexts: np.ndarray, logits: torch.Tensor) -> None:
    """The first row's words are numpy's wherever they are computed, and both ways name the same winners."""
    from assay.kernels import triton_sampling

    expected = chacha.expand(KEY, contexts[:1], logits.shape[1])[0]
    left = torch.isfinite(logits[0]).cpu().numpy()
    found = []
    for truncated in (False, True):
        winners, words = triton_sampling.winners_and_words(keys, logits, truncated=truncated)
        np.testing.assert_array_equal(words[0].cpu().numpy().view(np.uint32)[left], expected[left])
        found.append(winners)
    assert torch.equal(*found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        sys.exit("gpu_sampling.py needs an NVIDIA GPU and torch with CUDA; none is available here.")
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {rounds} rounds")
    bandwidth = copy_bandwidth(rounds)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s read and written")
    for vocabulary in (50257, 128256):
        for rows in (1, 8, 64, 256):
            for kept in (None, 50, 1000):
                table(rows, vocabulary, kept, bandwidth, rounds)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
