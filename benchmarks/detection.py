"""Detection speed: from token ids and from text, with transformers' own watermark detector in the same run.

    python benchmarks/detection.py

One thread. Times are process CPU times, medians over interleaved repeats; read the ratios, not the absolutes.
Targets: >= 10 M tokens/s from ids; from text <= 1.15x the time of tokenising alone.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NUMBA_NUM_THREADS"] = "1"

import argparse
import gzip
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from assay.detection.detect import detect
from assay.detection.gumbel import documents_test
from assay.detection.text import load_tokenizer
from assay.kernels import prf
from assay.kernels.chacha import Words
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keys import SecretKey, use_key

CORPUS = Path(__file__).resolve().parent.parent / "data" / "corpus"
WINDOW = 4


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def paired(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median CPU seconds of each, run in turn so that drift of the machine hits both."""
    times = [(cpu_seconds(first), cpu_seconds(second)) for _ in range(repeats)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--length", type=int, default=500, help="tokens per document")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-tokens", type=int, default=1024)
    arguments = parser.parse_args()

    key = SecretKey.generate(config=GumbelConfig(window=WINDOW))
    prf_key = use_key(key)
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.2, arguments.tokens) % 50_257).astype(np.uint32)
    offsets = np.arange(0, arguments.tokens + 1, arguments.length, dtype=np.int64)

    def ours() -> object:
        return documents_test(ids, offsets, prf_key, GumbelConfig(window=WINDOW))

    ours()  # compile
    seconds = statistics.median(cpu_seconds(ours) for _ in range(arguments.repeats))
    rate = arguments.tokens / seconds
    print(f"from token ids      {rate / 1e6:8.2f} M tokens/s  ({len(offsets) - 1} documents, target >= 10)")

    tokenizer = load_tokenizer()
    texts = []
    for book in sorted(CORPUS.glob("*.txt.gz")):
        prose = " ".join(gzip.decompress(book.read_bytes()).decode("utf-8").split())
        texts += [prose[i : i + 2000] for i in range(0, min(len(prose), 400_000), 2000)]

    def tokenise() -> object:
        return tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)

    def from_text() -> object:
        found, bounds = tokenizer.encode_batch(texts)
        return documents_test(found, bounds, prf_key, GumbelConfig(window=WINDOW))

    alone, whole = paired(tokenise, from_text, arguments.repeats)
    count = int(tokenizer.encode_batch(texts)[1][-1])
    print(f"from text           {count / whole / 1e6:8.2f} M tokens/s")
    print(f"  / tokenising alone {whole / alone:7.3f}  (target <= 1.15)")

    some = texts[:200]
    detect(some[0], key, tokenizer=tokenizer)
    one_by_one, tokenised = paired(
        lambda: [detect(text, key, tokenizer=tokenizer) for text in some],
        lambda: [tokenizer.encode(text) for text in some],
        arguments.repeats,
    )
    lists = [np.asarray(tokenizer.encode(text), dtype=np.uint32) for text in some]
    by_numpy, compiled = paired(
        lambda: [prf_words(prf_key, one, "numpy") for one in lists],
        lambda: [prf_words(prf_key, one, "numba") for one in lists],
        arguments.repeats,
    )
    each = 1e3 / len(some)
    print(f"one text at a time  {one_by_one * each:8.2f} ms of 2,000 characters ({tokenised * each:.2f} tokenising)")
    print(f"  its PRF words      {compiled * each:7.3f} ms compiled, {by_numpy * each:.2f} ms by numpy")

    peer = peer_rate(arguments.peer_tokens)
    print(f"transformers KGW    {peer:8.0f} tokens/s (WatermarkDetector, lefthash, same kind of ids)")
    print(f"  ours / theirs     {rate / peer:8.0f}x (target > 1000)")


def prf_words(prf_key: Words, ids: Words, backend: prf.Backend) -> Words:
    return prf.words_of(prf_key, ids, np.arange(WINDOW, len(ids)), WINDOW, backend=backend)


def peer_rate(tokens: int) -> float:
    """Tokens per CPU second of transformers' own green-list detector on ids of the same law."""
    import torch
    from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig

    torch.set_num_threads(1)
    detector = WatermarkDetector(
        model_config=LlamaConfig(vocab_size=50_257, bos_token_id=50_256),
        device="cpu",
        watermarking_config=WatermarkingConfig(),
    )
    ids = torch.from_numpy(np.random.default_rng(1).zipf(1.2, (2, tokens // 2)) % 50_257)
    detector(ids[:, :16])
    seconds = cpu_seconds(lambda: detector(ids))
    return ids.numel() / seconds


if __name__ == "__main__":
    main()
