"""Sampling speed of the schemes that tilt the law: a step of each against softmax and multinomial on the same scores.

    python benchmarks/tilted_sampling.py [--repeats N]

One thread. Times are process CPU times; ratios are medians over interleaved pairs; read the ratios, not the absolutes.
Target: near 1 for 50k tokens of vocabulary, and well below where top-k or top-p leaves few candidates.
"""

from __future__ import annotations

import os

os.environ["NUMBA_NUM_THREADS"] = "1"

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from assay.watermark.dipmark import DipmarkConfig
from assay.watermark.fixed_list import FixedListConfig
from assay.watermark.green_list import GreenListConfig
from assay.watermark.gumbel import GumbelConfig, unmarked_key
from assay.watermark.schemes import SchemeConfig, sampler_of
from assay.watermark.tournament import TournamentConfig

HISTORY = 512
CONFIGS: dict[str, SchemeConfig] = {
    "gumbel": GumbelConfig(),
    "green-list": GreenListConfig(),
    "green-list self": GreenListConfig(seeding="self"),
    "fixed-list": FixedListConfig(),
    "tournament m=30": TournamentConfig(),
    "dipmark": DipmarkConfig(),
}


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def step(name: str, rows: int, vocabulary: int, top_k: int | None, repeats: int) -> None:
    """From a float32 score array to tokens."""
    generator = torch.Generator().manual_seed(vocabulary + rows)
    scores = 3 * torch.randn(rows, vocabulary, generator=generator)
    if top_k is not None:
        scores[scores < torch.topk(scores, top_k).values[:, -1:]] = -torch.inf
    ids = torch.randint(0, vocabulary, (rows, HISTORY), generator=generator).numpy()
    array = scores.numpy()
    draw = sampler_of(CONFIGS[name], np.arange(8, dtype=np.uint32), unmarked_key(b"benchmark"))
    loops = max(1, 400_000 // (rows * vocabulary))  # so that the clock's tick does not matter

    def ours() -> None:
        for _ in range(loops):
            draw(ids, array, None)

    def theirs() -> None:
        for _ in range(loops):
            torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)

    ours()
    theirs()
    times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
    first, second = (statistics.median(column) / loops for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    kind = "full" if top_k is None else f"top-k {top_k}"
    print(
        f"{name:<16} V {vocabulary:>7,}  batch {rows}  {kind:<9}  step {1e3 * first:8.3f} ms  "
        f"softmax + multinomial {1e3 * second:8.3f} ms  ratio {ratio:.3f}"
    )


def main() -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in CONFIGS:
        for vocabulary in (2048, 50257, 128256):
            for top_k in (None, 50):
                step(name, 8, vocabulary, top_k, arguments.repeats)


if __name__ == "__main__":
    main()
