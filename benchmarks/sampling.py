"""Sampling speed: the watermark's step against softmax and multinomial, and generate() with and without the mark.

    python benchmarks/sampling.py [--repeats N] [--model FOLDER]

One thread. Times are process CPU times; ratios are medians over interleaved pairs; read the ratios, not the absolutes.
Targets: step <= 1.0 for 50k and 128k tokens of vocabulary, batch 1 and 8; generate() <= 1.05.
"""

from __future__ import annotations

import os

os.environ["NUMBA_NUM_THREADS"] = "1"

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from assay.models import DEFAULT, load_model
from assay.watermark.adapters._chance import Watched
from assay.watermark.adapters.transformers import _KeyedProcessor, for_transformers
from assay.watermark.gumbel import GumbelConfig, unmarked_key
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.schemes import sampler_of

HISTORY = 512
NEW_TOKENS = 96


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def paired(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both and the median of the pairwise ratios, after one warm-up of each."""
    ours()
    theirs()
    times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second, statistics.median(a / b for a, b in times)


def step(rows: int, vocabulary: int, top_k: int | None, key: SecretKey, repeats: int) -> None:
    """From a float32 score tensor to a one-hot tensor, against softmax + multinomial on the same scores."""
    generator = torch.Generator().manual_seed(vocabulary + rows)
    scores = 3 * torch.randn(rows, vocabulary, generator=generator)
    if top_k is not None:
        scores[scores < torch.topk(scores, top_k).values[:, -1:]] = -torch.inf
    ids = torch.randint(0, vocabulary, (rows, HISTORY), generator=generator)
    draw = Watched(sampler_of(GumbelConfig(), use_key(key), unmarked_key(b"benchmark")))
    draw.judged = True  # as after the first few tokens of any text that is not decided
    processor = _KeyedProcessor(draw, None)
    loops = max(1, 400_000 // (rows * vocabulary))  # so that the clock's tick does not matter

    def ours() -> None:
        for _ in range(loops):
            processor(ids, scores)

    def theirs() -> None:
        for _ in range(loops):
            torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)

    first, second, ratio = paired(ours, theirs, repeats)
    name = "full" if top_k is None else f"top-k {top_k}"
    print(
        f"V {vocabulary:>7,}  batch {rows}  {name:<9}  marked step {1e3 * first / loops:8.3f} ms  "
        f"softmax + multinomial {1e3 * second / loops:8.3f} ms  ratio {ratio:.3f}"
    )


def load(folder: Path | None) -> tuple[str, torch.nn.Module]:
    """The model in a folder, by default the bundled one, and a random one of its size where that is missing."""
    if folder is not None:
        return folder.name, load_model(folder)
    if (DEFAULT / "model.safetensors").exists():
        return "bundled model", load_model()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
    )
    return "random weights", LlamaForCausalLM(config).eval()


def end_to_end(name: str, model: torch.nn.Module, rows: int, key: SecretKey, repeats: int) -> None:
    """The whole of generate(), sampling at temperature 0.8 and top-p 0.95."""
    prompts = torch.randint(3, 512, (rows, 16), generator=torch.Generator().manual_seed(rows))
    settings = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "attention_mask": torch.ones_like(prompts),
        "pad_token_id": 0,
    }
    first, second, ratio = paired(
        lambda: model.generate(prompts, watermarking_config=for_transformers(key), **settings),
        lambda: model.generate(prompts, **settings),
        2 * repeats,
    )
    tokens = rows * NEW_TOKENS
    print(
        f"generate(), {name}, batch {rows}: marked {1e3 * first / NEW_TOKENS:.3f} ms per step "
        f"({tokens / first:,.0f} tokens/s), unmarked {1e3 * second / NEW_TOKENS:.3f} ms, ratio {ratio:.3f}"
    )


def main() -> None:
    """Print all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", type=Path, default=None, help="a local model folder for generate()")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    key = SecretKey.generate("benchmark")
    began = time.process_time()
    step_of_nothing = _KeyedProcessor(Watched(sampler_of(GumbelConfig(), use_key(key), unmarked_key(b""))), None)
    step_of_nothing(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8))
    print(f"first call, with compiling or loading the kernels: {time.process_time() - began:.2f} s")
    for vocabulary in (2048, 50257, 128256):
        for rows in (1, 8):
            for top_k in (None, 50):
                step(rows, vocabulary, top_k, key, arguments.repeats)
    name, model = load(arguments.model)
    for rows in (1, 8):
        end_to_end(name, model, rows, key, arguments.repeats)


if __name__ == "__main__":
    main()
