"""Reports against "a human wrote it": the run's numbers, its calibration, its own words, and no text of a document."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from assay import cli
from assay._errors import RunError
from assay.conformal import ConformalPValues
from assay.conformal.calibration import Calibration
from assay.conformal.human import calibrate
from assay.conformal.human_corpus import run_human
from assay.detection.corpus import RunSummary, engine, pool
from assay.kernels.scoring.model import ModelScorer
from assay.models import load_model, load_tokenizer_for_generation
from assay.report import Excerpt, Report, shares, wording
from assay.report.records import Counts
from assay.watermark.keyring import Keyring
from assay.watermark.signing import Ed25519Config
from tests.conftest import work_in_process
from tests.report.conftest import MADE, SyntheticHuman
from tests.report.test_report_html import Page, inert
from tests.report.test_report_run import CHROMIUM, assay_command, rendered

# What only a report on keys speaks of; "--public-key KEY" is the signer's.
OF_KEYS = re.compile(r"watermark|\bmark(s|ed)?\b|\bunmarked\b|fingerprint|secret key|repeats", re.IGNORECASE)


def words_of(html: str) -> str:
    """The text of a page without its style sheet."""
    return "".join(Page(re.sub(r"<style>.*?</style>", "<style></style>", html, flags=re.DOTALL)).text)


# Reports on results in memory.


def test_a_report_names_the_null_its_calibration_and_what_both_rest_on(
    human_report: Report, synthetic_human: SyntheticHuman
) -> None:
    known = synthetic_human.calibration
    (record,) = human_report.calibrations
    assert (record.id, record.score, record.min_tokens) == (known.id, "curvature", 20)
    assert record.texts_sha256 == "ef" * 32
    assert [(one.name, one.weights_sha256) for one in record.models] == [("scorer", "ab" * 32)]
    assert [(one.name, one.texts) for one in record.groups] == [("essays", 200), ("letters", 200)]
    assert [math.exp(one.log_pvalue_floor) for one in record.groups] == pytest.approx([1 / 201, 1 / 201])
    assert human_report.title == "Human-text audit"
    assert human_report.tests == ("human-curvature",)
    text = words_of(human_report.to_html())
    for shown in (
        human_report.verdict,
        "Human-text audit report",
        known.id,
        "ef" * 32,
        "exchangeable with the calibration texts",
        "Marginal guarantee",
        "Benjamini and Hochberg (1995) at a false discovery rate of 5%",
    ):
        assert shown in text
    assert f"{human_report.counts.flagged} of {human_report.counts.tested} tested documents" in human_report.verdict
    assert f"differ from the human texts of calibration {known.id}" in human_report.verdict
    assert human_report.counts.flagged > 30


def test_no_words_of_the_other_null(human_report: Report, full_report: Report) -> None:
    assert OF_KEYS.search(words_of(human_report.to_html())) is None
    assert OF_KEYS.search(human_report.to_json().decode().replace("repeats_dropped", "")) is None
    assert OF_KEYS.search(words_of(full_report.to_html())) is not None  # what is looked for would be found
    assert "calibration" not in words_of(full_report.to_html())


@pytest.mark.parametrize(
    ("tested", "flagged", "expected"),
    [
        (0, 0, "or none of a length that was calibrated"),
        (1, 0, "The one tested document does not differ from the human texts of calibration 0123"),
        (1, 1, "a human text like them is flagged with probability at most 5%"),
        (9, 0, "None of the 9 tested documents differs from .* This does not show that people wrote the documents"),
        (9, 1, r"1 of 9 tested documents \(11.1%\) differs from .* at most 5% are expected to be false alarms"),
        (9, 2, r"2 of 9 tested documents \(22.2%\) differ from "),
    ],
)
def test_verdicts(human_report: Report, tested: int, flagged: int, expected: str) -> None:
    counts = Counts(
        documents=9,
        tested=tested,
        flagged=flagged,
        short=0,
        short_flagged=0,
        rejected=0,
        tokens=0,
        tokens_scored=0,
        repeats_dropped=0,
    )
    calibration = replace(human_report.calibrations[0], id="0123")
    assert re.search(expected, wording.verdict(counts, 0.05, (), [calibration]))


def test_results_of_two_nulls_or_without_what_tested_them_are_refused(
    synthetic, synthetic_human: SyntheticHuman
) -> None:
    with pytest.raises(ValueError, match="calibration must be given"):
        Report.from_results(synthetic_human.results)
    with pytest.raises(ValueError, match="calibration must not be given"):
        synthetic.report(calibration=synthetic_human.calibration)
    with pytest.raises(ValueError, match="got both"):
        Report.from_results([*synthetic.results, *synthetic_human.results], calibration=synthetic_human.calibration)
    with pytest.raises(ValueError, match="about keys or about one calibration"):
        synthetic_human.report(keys=[synthetic.key])
    with pytest.raises(ValueError, match="excerpts must be empty with a calibration"):
        synthetic_human.report(excerpts=[Excerpt(doc_id="doc-0000", pieces=("secret",), log_tail=(-1.0,))])


def test_bins_of_one_calibration_scatter_more_than_binomially_so_no_band_is_drawn(human_report: Report) -> None:
    # 400 reports on 1000 human documents each, every one with a calibration of its own of 100 texts. With independent
    # p-values a binomial band errs in at most 1 % of them: more than 15 of 400 has probability 4e-6. Here it errs in
    # most.
    rng = np.random.default_rng(3)
    apart = together = 0
    for _ in range(400):
        p = ConformalPValues(level=0.05).fit(rng.normal(size=100)).p_values(rng.normal(size=1000))
        for name, logs in (("together", np.log(p)), ("apart", np.log(rng.random(1000)))):
            h = shares.histogram(logs)
            assert h.band_low is not None
            assert h.band_high is not None
            outside = not all(h.band_low <= count <= h.band_high for count in h.counts)
            together += outside and name == "together"
            apart += outside and name == "apart"
    assert apart <= 15
    assert together > 300
    assert (human_report.histogram.band_low, human_report.histogram.band_level) == (None, None)
    html = human_report.to_html()
    assert "in at least 99%" not in html
    assert "Band of the histogram" not in html
    assert "By chance each bar" not in html


# Reports on runs.


@pytest.fixture(scope="module")
def calibration(human_text: str) -> Calibration:
    scorer = ModelScorer(load_model(), load_tokenizer_for_generation())
    return calibrate([human_text[i : i + 300] for i in range(0, 39 * 300, 300)], scorer, score="log_perplexity")


@pytest.fixture(scope="module")
def place(tmp_path_factory, human_text: str, calibration: Calibration) -> Path:
    """A folder with an input of passages, repetitive texts, a short one and a reject, and `run/`, its results."""
    folder = tmp_path_factory.mktemp("human")
    rows = [{"id": f"h{i}", "text": human_text[20_000 + 400 * i :][:350], "from": "desk"} for i in range(12)]
    for i, word in enumerate(["day", "house", "night", "hand"]):
        rows.append({"id": f"m{i}", "text": f"and the {word} " * 40, "from": "wire"})
    rows.append({"id": "short", "text": "too short a secretword", "from": None})
    lines = [json.dumps(row) for row in rows]
    (folder / "a.jsonl").write_text("\n".join([*lines[:5], "{broken", *lines[5:]]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(engine, "visible_gpus", list)
        patch.setattr(pool, "work", work_in_process)
        run_human("a.jsonl", calibration, out="run", id_column="id", source_column="from", fdr=0.15, shard_rows=6)
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_report_on_a_run_has_the_runs_numbers(inside: Path, calibration: Calibration) -> None:
    report = Report.from_run("run", listed=99, made=MADE)
    table = {row["doc_id"]: row for row in parquet.read_table("run/results.parquet").to_pylist()}
    summary = RunSummary.read("run")
    assert (report.counts.documents, report.counts.flagged, report.fdr) == (17, summary.flagged, 0.15)
    assert (report.counts.tested, report.counts.rejected, report.counts.repeats_dropped) == (16, 1, 0)
    assert {one.doc_id for one in report.documents if one.flagged} == {"m0", "m1", "m2", "m3"}
    for one in report.documents:
        row = table[one.doc_id]
        for name in ("file", "row", "n_tokens", "n_scored", "statistic", "flagged"):
            assert getattr(one, name) == row[name]
        for name in ("log_pvalue", "log_qvalue", "log_evalue"):
            assert getattr(one, name) == row[name]
        assert (one.key_id, one.scheme, one.n_repeats_dropped) == (None, None, 0)
    assert {(one.source, one.documents, one.flagged) for one in report.sources} == {("desk", 12, 0), ("wire", 4, 4)}
    assert report.nulls == (summary.null,)
    assert report.tests == ("human-log_perplexity",)
    assert report.assumptions == summary.assumptions
    (record,) = report.calibrations
    assert (record.id, record.texts_sha256) == (calibration.id, calibration.texts_sha256)
    assert [(one.name, one.texts) for one in record.groups] == [("all texts", 39)]
    assert record.models[0].weights_sha256 == calibration.scorer.weights_sha256
    assert report.tokenizer is not None
    assert report.tokenizer.sha256 == calibration.scorer.tokenizer_sha256
    assert Report.from_json(report.to_json()) == report


def test_no_text_is_shown_whatever_is_asked_for(inside: Path, make_key) -> None:
    report = Report.from_run("run", keys=make_key(1), excerpts=10, listed=99, made=MADE)
    assert report == Report.from_run("run", listed=99, made=MADE)
    shown = report.to_json().decode() + words_of(report.to_html())
    for line in (inside / "a.jsonl").read_text().splitlines():
        if line != "{broken":
            words = json.loads(line)["text"].split()
            assert not [i for i in range(len(words) - 3) if " ".join(words[i : i + 4]) in shown]
    assert "secretword" not in shown
    assert "This report holds no text of any document." in shown


def test_a_run_that_names_its_calibration_alone_has_a_report(inside: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for file in (inside / "run").iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    summary = json.loads((copy / "summary.json").read_bytes())
    known = summary.pop("calibration_info")
    del summary["tests"]
    (copy / "summary.json").write_text(json.dumps(summary))
    report = Report.from_run(copy, made=MADE)
    (record,) = report.calibrations
    assert (record.id, record.score, record.groups) == (known["id"], None, ())
    inert(report.to_html())
    table = parquet.read_table(copy / "results.parquet")
    parquet.write_table(table.replace_schema_metadata({"assay.schema": "assay.other/1"}), copy / "results.parquet")
    with pytest.raises(RunError, match=r"schema 'assay.other/1', not 'assay.corpus-results/1' or 'assay.corpus-human"):
        Report.from_run(copy)


def test_commands_from_run_to_verified_report(inside: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="development"):
        ring = Keyring.create(tmp_path / "keyring.json", development=True)
    ring.new("office", Ed25519Config())
    out = tmp_path / "report"
    code, stdout, _ = assay_command(
        "report", "run", "--out", out, "--sign-with", "office", "--keyring", tmp_path / "keyring.json"
    )
    assert code == 0
    assert json.loads(stdout)["verdict"].startswith("4 of 16 tested documents (25%) differ from the human texts")
    assert Report.from_json((out / "report.json").read_bytes()).title == "Human-text audit"
    assay_command("keys", "export-public", "--keyring", tmp_path / "keyring.json", "--out", tmp_path / "public.json")
    code, stdout, _ = assay_command("verify", out, "--public-key", tmp_path / "public.json")
    assert (code, json.loads(stdout)["signer_checked"]) == (0, True)
    for name in ("report.json", "report.html"):
        data = (out / name).read_bytes()
        place = data.index(b"calibration")
        (out / name).write_bytes(data[:place] + b"C" + data[place + 1 :])
        code, stdout, _ = assay_command("verify", out, "--public-key", tmp_path / "public.json")
        assert code == 1
        assert json.loads(stdout)["problems"][0].startswith(f"{name}: changed")
        (out / name).write_bytes(data)


def test_an_unsigned_report_needs_no_keyring(inside: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.json")
    done = CliRunner().invoke(cli.app, ["report", "run", "--out", str(tmp_path / "r"), "--keyring", missing])
    assert done.exit_code == 0
    assert "keyring" not in done.stderr  # it is not even looked for


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed, so the page is not looked at in a browser")
def test_page_renders_in_a_browser_under_its_own_policy(inside: Path, tmp_path: Path) -> None:
    page = Report.from_run("run", made=MADE).save(tmp_path / "report")
    pixels, log = rendered(page, tmp_path / "good")
    assert pixels[5, 5].tolist() == [252, 251, 248]
    assert np.sum(np.all(pixels == (29, 92, 135), axis=2)) > 1000
    assert not np.any(np.all(pixels == (228, 225, 216), axis=2))  # the band's colour
    assert "CONSOLE" not in log, log
