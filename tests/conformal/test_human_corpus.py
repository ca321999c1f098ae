"""Corpora against "a human wrote it": rows equal to `human_tests`, what is refused, groups, devices, broken workers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

from assay._errors import CalibrationError, MissingDependencyError, RunError
from assay.cli import app
from assay.conformal import human_corpus
from assay.conformal.calibration import Calibration
from assay.conformal.human import calibrate, human_tests
from assay.conformal.human_corpus import HumanTests, run_human
from assay.detection.corpus import RunSummary, engine, models, pool, run, worker
from assay.detection.corpus.reading import Document
from assay.detection.corpus.shards import Shard
from assay.detection.corpus.subject import Setup, WorkerBroken
from assay.kernels.scoring import devices
from assay.kernels.scoring.model import ModelScorer
from assay.models import load_model, load_tokenizer_for_generation
from assay.watermark.keys import SecretKey


@pytest.fixture(scope="module")
def scorer() -> ModelScorer:
    return ModelScorer(load_model(), load_tokenizer_for_generation())


@pytest.fixture(scope="module")
def passages(human_text: str) -> list[str]:
    """60 passages of 300 characters."""
    return [human_text[i : i + 300] for i in range(0, 60 * 300, 300)]


@pytest.fixture(scope="module")
def calibration(scorer: ModelScorer, passages: list[str]) -> Calibration:
    return calibrate(passages[:40], scorer, level=0.1)


@pytest.fixture
def corpus(tmp_path: Path, passages: list[str]) -> Path:
    """20 passages, a short text, and two rejects."""
    rows = [json.dumps({"text": text, "key": i}) for i, text in enumerate([*passages[40:], "short"])]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:7], "{bad", *rows[7:], '{"text": "\\ud800", "key": 99}']))
    return tmp_path / "a.jsonl"


@pytest.fixture
def in_process(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:  # extends the shared one
    """Test shards in this process, as on a machine without GPUs."""
    monkeypatch.setattr(engine, "visible_gpus", list)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return parquet.read_table(out / "results.parquet").to_pylist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("in_process")
def test_every_row_is_what_human_tests_says(
    tmp_path: Path, corpus: Path, passages: list[str], calibration: Calibration, scorer: ModelScorer
) -> None:
    summary = run_human(corpus, calibration, out=tmp_path / "out", id_column="key", shard_rows=6, fdr=0.2)
    expected = human_tests([*passages[40:], "short"], calibration, scorer)
    rows = rows_of(tmp_path / "out")
    assert [row["doc_id"] for row in rows] == [str(i) for i in range(21)]
    for row, test in zip(rows, expected, strict=True):
        assert (row["n_tokens"], row["n_scored"]) == (test.n_tokens, test.n_scored)
        # Other batches than those of `expected`: float32 rounding of the model.
        assert row["statistic"] == pytest.approx(test.statistic, abs=1e-4)
    # A rank can change only where two scores are closer than that.
    assert np.mean([row["pvalue"] == pytest.approx(t.pvalue) for row, t in zip(rows, expected, strict=True)]) > 0.9
    assert rows[-1]["pvalue"] == 1.0
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_bytes().splitlines()]
    assert [(r["line"], r["reason"]) for r in rejects] == [(8, "invalid JSON"), (23, "lone surrogate")]
    assert (summary.documents, summary.calibration, summary.keys) == (21, calibration.id, ())
    assert summary.null.startswith("a human wrote the text")
    assert any(calibration.id in line for line in summary.assumptions)
    assert RunSummary.read(tmp_path / "out") == summary
    names = parquet.read_schema(tmp_path / "out/results.parquet").names
    assert "key_id" not in names


@pytest.mark.slow  # two processes that load torch
def test_worker_processes_give_the_same_bytes_and_a_run_resumes(
    tmp_path: Path, corpus: Path, calibration: Calibration, request: pytest.FixtureRequest
) -> None:
    calibration.save(tmp_path / "c.json")
    run_human(corpus, tmp_path / "c.json", out=tmp_path / "two", shard_rows=6, workers=2, device="cpu")
    request.getfixturevalue("in_process")
    run_human(corpus, calibration, out=tmp_path / "here", shard_rows=6, device="cpu")
    for name in ("results.parquet", "rejects.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert run_human(corpus, calibration, out=tmp_path / "two", shard_rows=6).already_finished


@pytest.mark.usefixtures("in_process")
def test_another_calibration_or_a_key_is_another_run(
    tmp_path: Path, corpus: Path, calibration: Calibration, scorer: ModelScorer, passages: list[str], make_key: Any
) -> None:
    key: SecretKey = make_key(1)
    run_human(corpus, calibration, out=tmp_path / "out")
    other = calibrate(passages[:39], scorer, level=0.1)
    with pytest.raises(RunError, match=f"calibration was '{calibration.id}' and is '{other.id}'"):
        run_human(corpus, other, out=tmp_path / "out")
    with pytest.raises(RunError, match=r"calibration was .* and is 'not there'; keys\.test-1 was 'not there'"):
        run(corpus, key, out=tmp_path / "out")
    with pytest.raises(RunError, match=r"whose qvalue is at most 0\.3\.$"):
        run_human(corpus, calibration, out=tmp_path / "out", fdr=0.3)


@pytest.mark.usefixtures("in_process")
def test_groups_of_documents(tmp_path: Path, passages: list[str], scorer: ModelScorer) -> None:
    known = calibrate(passages[:40], scorer, groups=["a", "b"] * 20, level=0.1)
    rows = [{"text": text, "kind": kind} for text, kind in zip(passages[40:44], ["a", "b", "c", None], strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"source_column must name the field .* calibrated are a, b"):
        run_human(tmp_path / "a.jsonl", known, out=tmp_path / "out")
    summary = run_human(tmp_path / "a.jsonl", known, out=tmp_path / "out", source_column="kind")
    expected = human_tests(passages[40:42], known, scorer, groups=["a", "b"])
    assert [row["pvalue"] for row in rows_of(tmp_path / "out")] == pytest.approx([test.pvalue for test in expected])
    assert summary.rejects_by_reason == {"group not calibrated": 2}
    assert "\"'c'\"" in (tmp_path / "out/rejects.jsonl").read_text()


@pytest.mark.slow
def test_another_model_ends_the_run_with_what_differs(tmp_path: Path, corpus: Path, calibration: Calibration) -> None:
    """Said by the worker, which alone loads the model."""
    changed = load_model()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    load_tokenizer_for_generation().save_pretrained(tmp_path / "changed")
    with pytest.raises(RunError, match=r"scorer is not the one that was calibrated \('default'\): weights_sha256"):
        run_human(corpus, calibration, out=tmp_path / "out", model=str(tmp_path / "changed"), workers=1, device="cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "gpu"}, ValueError, 'device must be "auto", "cpu" or "cuda"'),
        ({"other_model": "default"}, ValueError, "other_model must not be given"),
        ({"model": "/nowhere/model"}, RunError, "there is no folder at '/nowhere/model'"),
        ({"device": "cuda"}, RunError, "there is no GPU here that torch can use"),
        ({"calibration": "a.jsonl"}, CalibrationError, "is no calibration"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_options_that_cannot_be_meant(
    tmp_path: Path,
    corpus: Path,
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)

    def work(shards: Iterator[Shard], setup: Setup, count: int) -> Iterator[Any]:
        try:
            setup.tests.open()
        except ValueError as refused:  # as the pool does with a worker's refusal
            raise RunError(str(refused)) from refused
        yield from ()

    monkeypatch.setattr(pool, "work", work)
    with pytest.raises(error, match=message):
        run_human(corpus, options.pop("calibration", calibration), out=tmp_path / "out", **options)


@pytest.mark.usefixtures("in_process")
def test_the_command(tmp_path: Path, corpus: Path, calibration: Calibration) -> None:
    calibration.save(tmp_path / "c.json")
    (tmp_path / "notes.md").write_text("no document")
    arguments = ["detect", str(tmp_path), "--null", "human", "--calibration", str(tmp_path / "c.json"), "--fdr", "0.2"]
    options = ["--id-column", "key", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, [*arguments, *options])
    assert found.exit_code == 3, found.output
    assert (json.loads(found.stdout)["documents"], json.loads(found.stdout)["calibration"]) == (21, calibration.id)
    assert "2 files were left out" in found.stderr  # the notes and the calibration
    assert len(rows_of(tmp_path / "out")) == 21
    again = CliRunner().invoke(app, [*arguments, *options])
    assert "was finished already; nothing was tested again" in again.stderr
    other = CliRunner().invoke(app, [*arguments[:-1], "0.3", *options])
    assert (other.exit_code, "No text needs to be tested again" in other.stderr) == (1, True)
    for more, message in (
        (["--device", "cpu"], "--device is for"),
        (["--engine", "ray"], "give --out FOLDER"),
        (["--out", "o", "--address", "h:1"], "--address is for"),
        (["--out", "o", "--tokenizer", "t"], "--tokenizer cannot go"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *more])
        assert refused.exit_code == 2
        assert message in " ".join(refused.stderr.replace("\u2502", "").split())


# Devices.


def test_a_worker_whose_gpu_cannot_be_used_says_so(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES='7'.* cannot use"):
        HumanTests(calibration, "default", None, "auto").on("cuda").open()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingDependencyError, match="assay\\[models\\]"):
        HumanTests(calibration, "default", None, "cpu").open()


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3, 5", 2, ["3", "5"]), ("", 0, []), ("GPU-1f,GPU-2e", 1, ["GPU-1f"]), (None, 0, [])],
)
def test_gpus_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, named: str | None, count: int, expected: list[str]
) -> None:
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert devices.visible_gpus() == expected


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "expected"),
    [
        ("auto", ["0", "1"], None, ("cuda", 2, ["0", "1"])),
        ("cuda", ["4"], 3, ("cuda", 3, ["4"])),
        ("cpu", ["0"], 2, ("cpu", 2, [])),
        ("auto", [], 2, ("cpu", 2, [])),
    ],
)
def test_the_local_engine_takes_the_gpus_there_are(
    tmp_path: Path,
    corpus: Path,
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
    device: Any,
    gpus: list[str],
    workers: int | None,
    expected: Any,
) -> None:
    seen = []

    def work(shards: Iterator[Shard], setup: Setup, count: int, gpus: Any = ()) -> Iterator[Any]:
        seen.append((setup.tests.device, count, list(gpus)))
        yield from ()

    monkeypatch.setattr(engine, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(pool, "work", work)
    with pytest.raises(RunError, match="hold no document"):
        run_human(corpus, calibration, out=tmp_path / "out", device=device, workers=workers)
    assert seen == [expected]


def test_a_lost_gpu_costs_the_process_and_no_document(
    passages: list[str], calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fault of the context every later call fails too; to test on would reject whatever comes."""
    documents = [Document(0, row, 1, "a", str(row), "a", text) for row, text in enumerate(passages[:3], 1)]
    on_cpu = HumanTests(calibration, "default", None, "cpu")
    monkeypatch.setattr(models, "check_usable", lambda device: None)
    load = human_corpus.load_scorer
    monkeypatch.setattr(human_corpus, "load_scorer", lambda model, record, device: load(model, record, "cpu"))
    test = on_cpu.on("cuda").open()  # as far as it goes without a card: it computes on the CPU

    def failing(message: str) -> Any:
        def results(*arguments: Any) -> Any:
            raise RuntimeError(message)

        return results

    monkeypatch.setattr(human_corpus, "_results", failing("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(WorkerBroken):
        worker.shard_results(Shard(0, documents), test)
    monkeypatch.setattr(human_corpus, "_results", failing("CUDA out of memory. Tried to allocate 20 GiB"))
    with pytest.raises(RuntimeError, match="out of memory"):
        test(documents)


def test_what_is_sent_to_workers_holds_no_model(calibration: Calibration) -> None:
    tests = HumanTests(calibration, "default", None, "auto")
    pickled = pickle.dumps(Setup(tests, Path("folder")))
    assert len(pickled) < 100_000
    again = pickle.loads(pickled).tests
    assert again.calibration.id == calibration.id
    assert replace(again, calibration=calibration) == tests
