"""Corpus scoring with the bundled model against a plain padded Hugging Face loop: python benchmarks/corpus_scoring.py

Documents have log-normal lengths (median 300, sigma 1, clipped to 8 .. 1023 tokens) and random ids. The bundled
model was trained on 256 positions and reads 1024 here, in every way alike: time is measured, not text. All ways run in
one process, interleaved, best of the rounds; process CPU time, one thread. The loop is what one writes first: batches
in order of arrival, padded to the longest, full logits, log-softmax, gather, and the same statistics or none of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scoring_cpu import processor
from transformers import AutoModelForCausalLM

import assay
from assay.kernels.scoring.model import ModelScorer

BUNDLED = Path(assay.__file__).parent / "models" / "default"


def documents(count: int, vocabulary: int, longest: int) -> list[np.ndarray]:
    """Random ids: what a document says does not change what scoring it costs."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(300), 1, count)), 8, longest).astype(int)
    return [rng.integers(1, vocabulary, n) for n in lengths]


@torch.inference_mode()
def plain_loop(model: torch.nn.Module, docs: list[np.ndarray], batch: int, bos: int, full: bool) -> list[np.ndarray]:
    """Log-probabilities (and with `full` the statistics that score gives) by padding and full logits."""
    out = []
    for start in range(0, len(docs), batch):
        part = docs[start : start + batch]
        longest = max(map(len, part)) + 1
        ids = torch.zeros((len(part), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, doc in enumerate(part):
            ids[row, : len(doc) + 1] = torch.from_numpy(np.concatenate([[bos], doc]))
            mask[row, : len(doc) + 1] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        log_p = torch.log_softmax(logits, dim=-1)
        chosen = log_p.gather(-1, ids[:, 1:, None])
        if full:
            p = log_p.exp()
            entropy = -(p * log_p).sum(-1)
            deviation = -log_p - entropy[..., None]
            (p * deviation**2).sum(-1)
            (p * deviation**3).sum(-1)
            (log_p > chosen).sum(-1)
            for s in (-1.0, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5):
                torch.logsumexp((1 - s) * log_p, dim=-1)
        out += [chosen[row, : len(doc), 0].numpy() for row, doc in enumerate(part)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUNDLED), help="folder of a causal model")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--window", type=int, default=1024, help="positions read at once; what they cost, not how good")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--token-budgets", type=int, nargs="*", default=[2048])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), max_position_embeddings=options.window
    ).eval()
    bos = model.config.bos_token_id or 0
    docs = documents(options.documents, model.config.vocab_size, options.window - 1)
    tokens = sum(map(len, docs))
    ways: dict[str, Callable[[], list]] = {
        f"plain loop, batches of {n}, {'all statistics' if full else 'log p only'}": lambda n=n, full=full: plain_loop(
            model, docs, n, bos, full
        )
        for n in (8, 32)
        for full in (True, False)
    }
    for budget in options.token_budgets:
        scorer = ModelScorer(model, token_budget=budget)
        ways[f"ModelScorer, {budget} tokens a batch"] = lambda scorer=scorer: [s.log_prob for s in scorer.score(docs)]
    results = {name: way() for name, way in ways.items()}
    first = next(iter(results.values()))
    worst = max(np.abs(a - b).max() for other in results.values() for a, b in zip(first, other, strict=True))
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    floor = best[next(iter(ways))]
    print(
        f"{processor()}, torch {torch.__version__}, one thread, {options.dtype}; {len(docs)} documents, {tokens} tokens"
    )
    print(f"largest difference of a log-probability between the ways: {worst:.1e}")
    for name, seconds in best.items():
        rates = f"{len(docs) / seconds:7.1f} documents/s {tokens / seconds:9.0f} tokens/s"
        print(f"  {name:48s} {rates} {floor / seconds:6.2f}x")


if __name__ == "__main__":
    main()
