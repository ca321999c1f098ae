"""Documents per second of all zero-shot scores against loops of batch 1: python benchmarks/zero_shot_speed.py

The published Fast-DetectGPT and its baselines read one document at a time, take the full log-softmax and softmax, sort
the vocabulary for a rank, and run the model again for every score. Three loops: that; the same scores from one pass of
the model per document; and the curvature alone. Same model, same documents, interleaved in one process; process CPU
time of one thread, best of the rounds. Documents have log-normal lengths (median 100, clipped to 8 .. 250 tokens) of
random ids. Once with the bundled model (2,048 candidates) and once with its body under a random head of 50,257
candidates, the vocabulary of GPT-2: time is measured, not text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scoring_cpu import processor
from transformers import AutoConfig, AutoModelForCausalLM

from assay.detection.zero_shot import zero_shot_scores
from assay.kernels.scoring.model import ModelScorer
from assay.models import DEFAULT, load_model

Criterion = Callable[[torch.Tensor, torch.Tensor], float]


def curvature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    log_p, p = torch.log_softmax(logits, dim=-1), torch.softmax(logits, dim=-1)
    mean = (p * log_p).sum(-1)
    variance = (p * log_p.square()).sum(-1) - mean.square()
    return float((log_p.gather(-1, labels).sum() - mean.sum()) / variance.sum().sqrt())


def likelihood(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(torch.log_softmax(logits, dim=-1).gather(-1, labels).mean())


def entropy(logits: torch.Tensor, _: torch.Tensor) -> float:
    return float(-(torch.softmax(logits, dim=-1) * torch.log_softmax(logits, dim=-1)).sum(-1).mean())


def ranks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argsort(-1, descending=True) == labels).nonzero()[:, -1].float() + 1


def rank(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(ranks(logits, labels).mean())


def log_rank(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(ranks(logits, labels).log().mean())


CRITERIA: tuple[Criterion, ...] = (curvature, likelihood, entropy, rank, log_rank)


@torch.inference_mode()
def logits_and_labels(model: Any, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    sequence = torch.tensor([[model.config.bos_token_id, *ids.tolist()]])
    return model(sequence).logits[:, :-1], sequence[:, 1:, None]


@torch.inference_mode()
def pass_per_score(model: Any, documents: list[np.ndarray]) -> np.ndarray:
    return np.array([[one(*logits_and_labels(model, ids)) for ids in documents] for one in CRITERIA]).T


@torch.inference_mode()
def one_pass(model: Any, documents: list[np.ndarray]) -> np.ndarray:
    """All scores from one pass, nothing computed twice: what a careful user writes."""
    out = []
    for ids in documents:
        logits, labels = logits_and_labels(model, ids)
        log_p = torch.log_softmax(logits, dim=-1)
        p = log_p.exp()
        chosen, mean = log_p.gather(-1, labels), (p * log_p).sum(-1)
        variance = (p * log_p.square()).sum(-1) - mean.square()
        places = ranks(logits, labels)
        out.append(
            [
                float((chosen.sum() - mean.sum()) / variance.sum().sqrt()),
                float(chosen.mean()),
                float(-mean.mean()),
                float(places.mean()),
                float(places.log().mean()),
            ]
        )
    return np.array(out)


def ours(scorer: ModelScorer, documents: list[np.ndarray]) -> np.ndarray:
    found = zero_shot_scores(documents, scorer)
    mean_entropy = found["log_perplexity"] - found["entropy_gap"]
    names = (found["curvature"], -found["log_perplexity"], mean_entropy, found["rank"], found["log_rank"])
    return np.stack(names, axis=1)


@torch.inference_mode()
def curvature_only(model: Any, documents: list[np.ndarray]) -> np.ndarray:
    return np.array([[curvature(*logits_and_labels(model, ids))] for ids in documents])


def table(model: Any, count: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(100), 0.7, count)), 8, 250).astype(int)
    documents = [rng.integers(1, model.config.vocab_size, n) for n in lengths]
    scorer = ModelScorer(model)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "batch 1, a pass per score (published)": lambda: pass_per_score(model, documents),
        "batch 1, all scores from one pass": lambda: one_pass(model, documents),
        "batch 1, curvature only": lambda: curvature_only(model, documents),
        "zero_shot_scores: all scores": lambda: ours(scorer, documents),
    }
    results = [way() for way in ways.values()]
    # Ranks may move by one where float32 logits differ in the last bit; means of the rest are compared.
    worst = max(float(np.max(np.abs(one[:, :3] - results[0][:, : one.shape[1]][:, :3]))) for one in results)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    tokens = lengths.sum()
    print(f"\n{model.config.vocab_size} candidates, {count} documents, {tokens} tokens; scores agree to {worst:.0e}")
    mine = best["zero_shot_scores: all scores"]
    for name, seconds in best.items():
        print(f"  {name:40s} {count / seconds:7.1f} documents/s, ours against it {seconds / mine:5.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{processor()}, torch {torch.__version__}, one thread")
    table(load_model(), options.documents, options.rounds)
    config = AutoConfig.from_pretrained(DEFAULT, vocab_size=50257)
    table(AutoModelForCausalLM.from_config(config).float().eval(), max(1, options.documents // 5), options.rounds)


if __name__ == "__main__":
    main()
