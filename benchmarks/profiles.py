"""Deployed marks: reading speed and writing cost against transformers, and the error rates of the official rules.

    python benchmarks/profiles.py

One thread. Times are process CPU times, medians of interleaved repeats in one run; read the ratios, not the absolutes.
Targets: hf-kgw warm >= 1000x transformers' WatermarkDetector; hf-synthid >= 3x its g-values and masks.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"

import argparse
import gzip
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from assay.detection import hf_kgw, hf_synthid, vllm_gumbel
from assay.detection.text import load_tokenizer
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.profiles import hf_kgw as kgw_contract
from assay.watermark.profiles import hf_synthid as synthid_contract
from assay.watermark.profiles import vllm_gumbel as vllm_contract
from assay.watermark.profiles.hf_kgw import HfKgwConfig
from assay.watermark.profiles.hf_synthid import HfSynthIdConfig
from assay.watermark.profiles.vllm_gumbel import VllmGumbelConfig

CORPUS = Path(__file__).resolve().parent.parent / "data" / "corpus"
V = 50_257
Rule = Callable[[np.ndarray, int], float]


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def paired(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median CPU seconds of each, run in turn so that drift of the machine hits both."""
    times = [(cpu_seconds(first), cpu_seconds(second)) for _ in range(repeats)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def offsets_of(count: int, length: int) -> np.ndarray:
    return np.arange(0, count * length + 1, length, dtype=np.int64)


def reading(repeats: int) -> None:
    import torch
    from transformers import LlamaConfig, WatermarkingConfig
    from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor
    from transformers.generation.watermarking import WatermarkDetector

    rng = np.random.default_rng(0)
    print("| reading, tokens/s | transformers | Assay, p-values included | ratio |\n|---|---|---|---|")
    for scheme, width in (("lefthash", 1), ("selfhash", 4)):
        config = HfKgwConfig(vocab_size=V, seeding_scheme=scheme, context_width=width)
        prf_key = use_key(SecretKey.from_integers(config, [15485863]))
        settings = WatermarkingConfig(seeding_scheme=scheme, context_width=width)
        detector = WatermarkDetector(LlamaConfig(vocab_size=V, bos_token_id=0), "cpu", settings)
        # The same documents for both; ours many times over, since theirs take a second for what is a millisecond here.
        texts = rng.zipf(1.2, (4, 512)) % (V - 1) + 1
        many = np.tile(texts.reshape(-1), 60).astype(np.uint32)
        few, tiled = torch.from_numpy(texts), offsets_of(240, 512)

        def ours() -> object:
            return hf_kgw.documents_test(many, tiled, prf_key, config)  # noqa: B023  # called in this round only

        ours()
        kgw_contract.green_lists.cache_clear()
        cold = cpu_seconds(lambda: hf_kgw.documents_test(many[:2048], offsets_of(4, 512), prf_key, config))  # noqa: B023
        ours()
        detector(few[:, :16])
        theirs, mine = paired(lambda: detector(few), ours, repeats)  # noqa: B023
        slow, fast = texts.size / theirs, many.size / mine
        print(f"| hf-kgw {scheme}, warm | {slow:,.0f} | {fast:,.0f} | **{fast / slow:,.0f}** |")
        print(f"| hf-kgw {scheme}, no list made before | | {2048 / cold:,.0f} | {2048 / cold / slow:,.0f} |")
    config = HfSynthIdConfig()
    keys = [int(key) for key in rng.integers(0, 2**40, 30)]
    prf_key = use_key(SecretKey.from_integers(config, keys))
    processor = SynthIDTextWatermarkLogitsProcessor(
        ngram_len=5,
        keys=keys,
        sampling_table_size=2**16,
        sampling_table_seed=0,
        context_history_size=1024,
        device="cpu",
    )
    texts = rng.zipf(1.2, (64, 512)) % V
    rows = texts.astype(np.uint32)
    batch = torch.from_numpy(texts)

    def official() -> object:
        return processor.compute_g_values(batch), processor.compute_context_repetition_mask(batch)

    def values_and_masks() -> object:
        return [
            (synthid_contract.g_values(row, prf_key, config), synthid_contract.context_mask(row, config))
            for row in rows
        ]

    def scores() -> object:
        return [synthid_contract.official_scores(row, prf_key, config) for row in rows]

    def pvalues() -> object:
        return hf_synthid.documents_test(rows.reshape(-1), offsets_of(64, 512), prf_key, config)

    for name, work in (
        ("g-values and masks", values_and_masks),
        ("means under the masks", scores),
        ("p-values", pvalues),
    ):
        work()
        theirs, mine = paired(official, work, repeats)
        slow, fast = texts.size / theirs, texts.size / mine
        print(f"| hf-synthid, {name} | {slow:,.0f} (g-values and masks) | {fast:,.0f} | **{fast / slow:.1f}** |")


def writing(repeats: int) -> None:
    import torch
    from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

    rng = np.random.default_rng(1)
    scores = rng.normal(0, 3, (8, V)).astype(np.float32)
    ids = rng.integers(1, V, (8, 20))
    tensor, history = torch.from_numpy(scores), torch.from_numpy(ids)
    print("\n| tilting 8 rows of 50,257 scores, ms | transformers | Assay | ratio |\n|---|---|---|---|")
    for name, config, settings, contract in (
        ("hf-kgw lefthash", HfKgwConfig(vocab_size=V), WatermarkingConfig(), kgw_contract),
        (
            "hf-kgw selfhash, width 4",
            HfKgwConfig(vocab_size=V, seeding_scheme="selfhash", context_width=4),
            WatermarkingConfig(seeding_scheme="selfhash", context_width=4),
            kgw_contract,
        ),
        (
            "hf-synthid, depth 30",
            HfSynthIdConfig(),
            SynthIDTextWatermarkingConfig(ngram_len=5, keys=list(range(1, 31))),
            synthid_contract,
        ),
    ):
        integers = [15485863] if contract is kgw_contract else list(range(1, 31))
        prf_key = use_key(SecretKey.from_integers(config, integers))
        processor = settings.construct_processor(V, "cpu")

        def theirs() -> object:
            return processor(history, tensor)  # noqa: B023  # called in this round only

        def ours() -> object:
            return contract.tilted_log_weights(ids, scores, None, prf_key, config)  # noqa: B023

        ours()
        slow, fast = paired(theirs, ours, repeats)
        print(f"| {name} | {1e3 * slow:,.1f} | {1e3 * fast:,.1f} | {slow / fast:,.1f} |")


def key_words(config: Any, number: int) -> np.ndarray:
    return use_key(SecretKey(number.to_bytes(32, "big"), id="k", config=config))


def kgw_rule(config: HfKgwConfig, *, distinct: bool) -> Rule:
    def pvalue(text: np.ndarray, number: int) -> float:
        prf_key = key_words(config, number)
        n, green = kgw_contract.official_counts(text, prf_key, config, ignore_repeated_ngrams=distinct)
        r = config.greenlist_ratio
        return float(stats.norm.sf((green - r * n) / math.sqrt(n * r * (1 - r))))

    return pvalue


def mean_rule(config: HfSynthIdConfig) -> Rule:
    """What users do with the mean g-value, since transformers gives no p-value: a z-test against fair coins."""

    def pvalue(text: np.ndarray, number: int) -> float:
        n, mean, _ = synthid_contract.official_scores(text, key_words(config, number), config)
        return float(stats.norm.sf((mean - 0.5) * 2 * math.sqrt(n * config.depth)))

    return pvalue


def matched_rule(config: VllmGumbelConfig) -> Rule:
    """vLLM's Gamma with the two moments of the weighted sum."""

    def pvalue(text: np.ndarray, number: int) -> float:
        n, score = vllm_contract.official_scores(text, key_words(config, number), config)
        v = (1 - config.alpha) ** 2 + config.alpha**2
        return float(stats.gamma.sf(score / v, n / v))

    return pvalue


def exact_rule(module: Any, config: Any) -> Rule:
    def pvalue(text: np.ndarray, number: int) -> float:
        whole = np.array([0, len(text)], dtype=np.int64)
        return math.exp(module.documents_test(text, whole, key_words(config, number), config).log_pvalue[0])

    return pvalue


def error_rates(pairs: int) -> None:
    tokenizer = load_tokenizer()
    prose = tokenizer.encode(gzip.decompress((CORPUS / "the-time-machine.txt.gz").read_bytes()).decode("utf-8"))
    rng = np.random.default_rng(2)
    starts = rng.integers(0, len(prose) - 400, pairs)
    vocabulary = 2048
    kinds = {
        "prose, 400 tokens": lambda i: prose[starts[i] : starts[i] + 400],
        "80 tokens of prose, five times": lambda i: np.tile(prose[starts[i] : starts[i] + 80], 5),
        "heavy Zipf, 400 tokens": lambda i: (np.random.default_rng(i).zipf(1.2, 400) % vocabulary).astype(np.uint32),
    }
    left = HfKgwConfig(vocab_size=vocabulary)
    own = HfKgwConfig(vocab_size=vocabulary, seeding_scheme="selfhash", context_width=4)
    synthid, dual = HfSynthIdConfig(), VllmGumbelConfig(algorithm="dual_key_gumbel", alpha=0.1)
    print(f"\n| false positives at 1 % / 0.1 %, {pairs:,} (text, key) pairs | " + " | ".join(kinds) + " |")
    print("|---|" + "---|" * len(kinds))
    rules: list[tuple[str, Rule]] = [
        ("hf-kgw lefthash, official default", kgw_rule(left, distinct=False)),
        ("hf-kgw lefthash, official `ignore_repeated_ngrams`", kgw_rule(left, distinct=True)),
        ("hf-kgw lefthash, Assay", exact_rule(hf_kgw, left)),
        ("hf-kgw selfhash, official default", kgw_rule(own, distinct=False)),
        ("hf-kgw selfhash, official `ignore_repeated_ngrams`", kgw_rule(own, distinct=True)),
        ("hf-kgw selfhash, Assay", exact_rule(hf_kgw, own)),
        ("hf-synthid, mean g-value against 1/2", mean_rule(synthid)),
        ("hf-synthid, Assay", exact_rule(hf_synthid, synthid)),
        ("vllm-gumbel dual key, official", matched_rule(dual)),
        ("vllm-gumbel dual key, Assay", exact_rule(vllm_gumbel, dual)),
    ]
    # All rules of one pair in turn: they share what a key costs to prepare.
    p = np.array([[[rule(make(i), i) for _, rule in rules] for i in range(pairs)] for make in kinds.values()])
    for number, (name, _) in enumerate(rules):
        cells = [f"{100 * np.mean(q <= 0.01):.2f} % / {100 * np.mean(q <= 0.001):.2f} %" for q in p[:, :, number]]
        print(f"| {name} | " + " | ".join(cells) + " |")
    book = prose[: len(prose) // 1000 * 1000]
    p = np.array(
        [[rule(book, i) for rule in (mean_rule(synthid), exact_rule(hf_synthid, synthid))] for i in range(200)]
    )
    print(
        f"\nhf-synthid on one text of {len(book):,} tokens, 200 keys: mean p-value {p[:, 0].mean():.2f} (mean rule), ",
        end="",
    )
    print(f"{p[:, 1].mean():.2f} (Assay).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2000)
    arguments = parser.parse_args()
    reading(arguments.repeats)
    writing(arguments.repeats)
    error_rates(arguments.pairs)


if __name__ == "__main__":
    main()
