"""The tour: generate marked and plain text with the bundled model, tamper with some, test all, write a signed report.

The top-level flow reads from `run`; every step is the public API that a user would call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.detection.detect import detect
from assay.detection.multiplicity import benjamini_hochberg
from assay.detection.result import TestResult
from assay.detection.text import load_tokenizer
from assay.kernels.scoring.model import ModelScorer
from assay.models import DEFAULT, load_model, load_tokenizer_for_generation
from assay.report import Report
from assay.report.excerpts import excerpt_of
from assay.watermark.edits import Edit, edit, paste
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keyring import Keyring
from assay.watermark.keys import SecretKey
from assay.watermark.signing import Ed25519Config

PROMPTS = (
    "It was late in the evening when",
    "The old house by the river",
    "My dear sister wrote to me that",
    "We walked along the shore until",
    "In the morning the captain said",
)
TEMPERATURE = 0.8
TOP_P = 0.95
NEW_TOKENS = 220
EDITS: tuple[tuple[Edit, float, str], ...] = (
    ("substitute", 0.1, "10 % of tokens replaced"),
    ("substitute", 0.3, "30 % of tokens replaced"),
    ("delete", 0.1, "10 % of tokens deleted"),
    ("delete", 0.3, "30 % of tokens deleted"),
    ("insert", 0.1, "10 % of tokens inserted"),
    ("insert", 0.3, "30 % of tokens inserted"),
)


SHOWN = ("marked-1", "marked-1-substitute-10%", "marked-2-in-human-text", "human-1")


@dataclass(frozen=True)
class Exhibit:
    """One text of the tour: what it is, and the text."""

    doc_id: str
    source: str
    text: str


@dataclass(frozen=True)
class Finding:
    """One exhibit with its results without and with the model, and whether the report flags it."""

    exhibit: Exhibit
    plain: TestResult
    with_model: TestResult
    flagged: bool


@dataclass(frozen=True)
class Tour:
    """What the tour produced: findings in order, the report's page, and seconds taken."""

    findings: tuple[Finding, ...]
    page: Path
    seconds: float


def run(out: Path, *, model: str | None = None, seed: int = 0, say: Callable[[str], None] = lambda _: None) -> Tour:
    """Run the tour and write the signed report into `out`.

    Parameters
    ----------
    out
        Folder for the report; made when missing.
    model
        Local folder or hub id of a causal model; default the bundled one.
    seed
        Seed of the sampler and of the edits. The watermark key is fresh each time, so p-values differ from run to run.
    say
        Called with one line per step.
    """
    began = time.perf_counter()
    # First, so that a place that cannot be written is known before any work is done.
    out.mkdir(parents=True, exist_ok=True)
    say("making a watermark key and a signing key")
    keyring = Keyring.in_memory()
    key = keyring.new("tour-key", GumbelConfig())
    signer = keyring.new("tour-signer", Ed25519Config())
    say(f"generating {2 * len(PROMPTS)} texts with {model or 'the bundled model'}")
    loaded = load_model(model)
    words = load_tokenizer_for_generation(model)
    tokenizer = load_tokenizer(words)
    exhibits = make_exhibits(loaded, words, key, seed)
    say(f"testing {len(exhibits)} texts, without and with the model")
    scorer = ModelScorer(loaded)
    plain = [detect(exhibit.text, key, tokenizer=tokenizer) for exhibit in exhibits]
    aware = [
        detect(exhibit.text, key, model=scorer, tokenizer=tokenizer, temperature=TEMPERATURE) for exhibit in exhibits
    ]
    say("building and signing the report")
    report = Report.from_results(
        [(e.doc_id, e.source, result) for e, result in zip(exhibits, aware, strict=True)],
        title="Assay tour",
        excerpts=[excerpt_of(e.doc_id, e.text, tokenizer, key) for e in exhibits if e.doc_id in SHOWN],
        keys=[key],
        tokenizer=tokenizer,
    )
    report.save(out, sign_with=signer)
    flags = _flags(aware, report.fdr)
    findings = tuple(map(Finding, exhibits, plain, aware, flags))
    return Tour(findings, out / "report.html", time.perf_counter() - began)


def make_exhibits(model: Any, tokenizer: Any, key: SecretKey, seed: int) -> list[Exhibit]:
    """Marked, plain, tampered and human texts."""
    marked = _generate(model, tokenizer, key, seed)
    plain = _generate(model, tokenizer, None, seed)
    human = [text for text in (DEFAULT / "held-out.txt").read_text(encoding="utf-8").split("\n") if len(text) > 400]
    exhibits = [Exhibit(f"marked-{i}", "marked", tokenizer.decode(ids)) for i, ids in enumerate(marked, 1)]
    exhibits += [Exhibit(f"plain-{i}", "same model, no mark", tokenizer.decode(ids)) for i, ids in enumerate(plain, 1)]
    exhibits += [Exhibit(f"human-{i}", "human", text) for i, text in enumerate(human[:4], 1)]
    rng = np.random.default_rng(seed)
    for kind, rate, name in EDITS:
        changed = edit(marked[0], kind, rate, len(tokenizer), rng)
        exhibits.append(Exhibit(f"marked-1-{kind}-{rate:.0%}", name, tokenizer.decode(changed)))
    host = load_tokenizer(tokenizer).encode(human[-1])
    mixed = paste(marked[1], host, len(host) // 2)
    exhibits.append(Exhibit("marked-2-in-human-text", "pasted into human text", tokenizer.decode(mixed)))
    return exhibits


def _generate(model: Any, tokenizer: Any, key: SecretKey | None, seed: int) -> list[npt.NDArray[np.int64]]:
    import torch

    from assay.watermark import for_transformers

    texts = []
    for number, prompt in enumerate(PROMPTS):
        inputs = tokenizer(prompt, return_tensors="pt")
        torch.manual_seed(1000 * seed + number + (0 if key is None else 500))
        out = model.generate(
            **inputs,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            watermarking_config=None if key is None else for_transformers(key),
        )
        texts.append(out[0, inputs["input_ids"].shape[1] :].numpy())
    return texts


def _flags(results: list[TestResult], fdr: float) -> list[bool]:
    log_qvalues = benjamini_hochberg(np.array([result.log_pvalue for result in results]))
    return [bool(q <= np.log(fdr)) for q in log_qvalues]
