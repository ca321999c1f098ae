"""Synthetic documents with a fixed seed: uniform words for unmarked text, high scores favoured for marked text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pytest

from assay.conformal import ConformalPValues, MonitorResult, SentenceLabeller, SentenceLabels, monitor_scores
from assay.conformal.calibration import Calibration
from assay.conformal.human import NULL, p_to_log_e
from assay.detection.gumbel import sum_test
from assay.detection.result import TestResult
from assay.detection.scorers import ScorerRecord
from assay.report import Excerpt, InputFile, RejectReason, Report
from assay.watermark.gumbel import GumbelConfig, Pivots, sum_scores
from assay.watermark.keys import SecretKey
from assay.watermark.signing import Ed25519Config

MADE = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
SOURCES = ("editorial", "agency wire", "reader letters", "archive")


@dataclass(frozen=True)
class Synthetic:
    """Results as `Report.from_results` takes them, an excerpt for each, and which documents are marked."""

    results: list[tuple[str, str, TestResult]]
    excerpts: dict[str, Excerpt]
    marked: list[bool]
    key: SecretKey

    def report(self, **changes: object) -> Report:
        return Report.from_results(self.results, **{"keys": [self.key], "made": MADE, **changes})


def make_documents(n: int, seed: int) -> Synthetic:
    rng = np.random.default_rng(seed)
    key = SecretKey(bytes(range(32)), id="newsroom-2026", config=GumbelConfig(), created=MADE)
    results, excerpts, marked = [], {}, []
    for i in range(n):
        length = int(np.exp(rng.uniform(np.log(3), np.log(3000))))
        source = SOURCES[int(rng.integers(len(SOURCES)))]
        is_marked = source != "archive" and bool(rng.random() < 0.4)
        counted = max(0, length - 4)
        u = rng.random(counted)
        if is_marked:
            u **= 1 / rng.uniform(1.0, 2.5, counted)
        words = np.minimum((1 - u) * 2.0**32, 2.0**32 - 1).astype(np.uint32)
        kept = rng.random(counted) > 0.03
        pivots = Pivots(np.flatnonzero(kept) + 4, words[kept], length, counted - int(kept.sum()))
        doc_id = f"doc-{i:04d}"
        results.append((doc_id, source, replace(sum_test(pivots), key_id=key.id, scheme="gumbel/1")))
        marked.append(is_marked)
        tails: list[float | None] = [None] * length
        for position, score in zip(pivots.positions, sum_scores(pivots.words), strict=True):
            tails[position] = min(0.0, -float(score))
        pieces = tuple(f" secretword{j}" for j in range(length))
        excerpts[doc_id] = Excerpt(doc_id=doc_id, pieces=pieces, log_tail=tuple(tails))
    return Synthetic(results, excerpts, marked, key)


@pytest.fixture(scope="session")
def synthetic() -> Synthetic:
    return make_documents(300, seed=7)


@pytest.fixture(scope="session")
def watched() -> MonitorResult:
    """900 scores of one source after 300 of reference; from the 600th on they are far lower, and an alarm is raised."""
    scores = np.random.default_rng(5).normal(size=1200)
    scores[900:] -= 4
    return monitor_scores(scores, reference=300, direction="below", random_state=5)


@pytest.fixture(scope="session")
def labelled() -> list[SentenceLabels]:
    """Sets for 30 stretches of one to three sentences that follow 63 known ones; the detector is a fair one."""
    rng = np.random.default_rng(6)
    known = (["human"] * 12 + ["llm"] * 9) * 3
    labeller = SentenceLabeller([0.0, 1.0, 2.0]).fit(known, rng.normal(size=63) + 2 * (np.array(known) == "llm"))
    return [labeller.predict(rng.normal(size=1 + i % 3) + 2 * (i % 2), rng=rng) for i in range(30)]


@pytest.fixture(scope="session")
def full_report(synthetic: Synthetic, watched: MonitorResult, labelled: list[SentenceLabels]) -> Report:
    """A report with something in every field."""
    order = sorted(synthetic.results, key=lambda row: row[2].log_pvalue)
    return synthetic.report(
        title="Newsroom archive, third quarter",
        excerpts=[synthetic.excerpts[row[0]] for row in order[:3]],
        inputs=[InputFile(name="a.jsonl", sha256="9f" * 32, size=48), InputFile(name="x", sha256=None, size=None)],
        rejects=[RejectReason(reason="invalid UTF-8", rows=3)],
        monitoring=[("agency wire", watched), ("columns", labelled)],
    )


@dataclass(frozen=True)
class SyntheticHuman:
    """As `Synthetic`, against "a human wrote it": scores of human texts are normal, those of machines larger by 4."""

    results: list[tuple[str, str, TestResult]]
    calibration: Calibration

    def report(self, **changes: object) -> Report:
        return Report.from_results(self.results, **{"calibration": self.calibration, "made": MADE, **changes})


def make_human_documents(n: int, seed: int) -> SyntheticHuman:
    rng = np.random.default_rng(seed)
    model = ScorerRecord(
        name="scorer",
        weights_sha256="ab" * 32,
        tokenizer_sha256="cd" * 32,
        dtype="float32",
        logits_dtype="float32",
        window=512,
        stride=256,
        bos=0,
    )
    kinds = np.array(["essays", "letters"] * 200)
    scores = rng.normal(size=400)
    calibration = Calibration(
        score="curvature",
        scorer=model,
        other=None,
        p_values=ConformalPValues(level=0.01).fit(scores, kinds),
        grouped=True,
        length_edges=(),
        min_tokens=20,
        scores=scores,
        groups=kinds,
        texts_sha256="ef" * 32,
    )
    lengths = np.exp(rng.uniform(np.log(5), np.log(3000), n)).astype(int)
    machine = rng.random(n) < 0.3
    values = rng.normal(size=n) + 4.0 * machine
    groups = kinds[:n]
    results = []
    p_values = calibration.p_values.p_values(values, groups)
    for i, (value, p, length, group) in enumerate(zip(values, p_values, lengths, groups, strict=True)):
        counts = length >= calibration.min_tokens
        found = TestResult(
            test="human-curvature",
            statistic=float(value) if counts else 0.0,
            log_pvalue=float(np.log(p)) if counts else 0.0,
            log_evalue=p_to_log_e(float(p)) if counts else 0.0,
            n_tokens=int(length),
            n_scored=int(length) if counts else 0,
            null=f"{NULL} ({group})",
            alternative="greater",
            assumptions=calibration.sentences(),
        )
        results.append((f"doc-{i:04d}", str(group), found))
    return SyntheticHuman(results, calibration)


@pytest.fixture(scope="session")
def synthetic_human() -> SyntheticHuman:
    return make_human_documents(300, seed=11)


@pytest.fixture(scope="session")
def human_report(synthetic_human: SyntheticHuman) -> Report:
    """A report against "a human wrote it" with something in every field that such a report has."""
    return synthetic_human.report(
        fdr=0.05,  # the smallest p-value of 200 calibration texts is 0.005
        inputs=[InputFile(name="a.jsonl", sha256="9f" * 32, size=48)],
        rejects=[RejectReason(reason="group not calibrated", rows=2)],
    )


@pytest.fixture(params=["full_report", "human_report"])
def any_report(request: pytest.FixtureRequest) -> Report:
    """A full report on each null hypothesis."""
    report: Report = request.getfixturevalue(request.param)
    return report


@pytest.fixture(scope="session")
def small_report() -> Report:
    return make_documents(4, seed=3).report(listed=2)


@pytest.fixture(scope="session")
def make_signer() -> Callable[[int], SecretKey]:
    def make(number: int) -> SecretKey:
        return SecretKey(bytes([number]) * 32, id=f"audit-office-{number}", config=Ed25519Config(), created=MADE)

    return make
