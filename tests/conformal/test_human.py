"""Human or LLM: p-values of calibrated scores, calibrations as files, scorers that differ are refused, the commands."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from typer.testing import CliRunner

from assay._errors import CalibrationError
from assay.cli import app
from assay.conformal.calibration import Calibration, length_groups
from assay.conformal.human import calibrate, human_tests, p_to_log_e
from assay.detection.result import TestResult
from assay.detection.zero_shot.scores import LARGER_MEANS_LLM
from assay.kernels.scoring.model import ModelScorer
from assay.models import load_model, load_tokenizer_for_generation

CORPUS = Path(__file__).resolve().parents[2] / "data" / "corpus"


@pytest.fixture(scope="module")
def scorer() -> ModelScorer:
    return ModelScorer(load_model(), load_tokenizer_for_generation())


@pytest.fixture(scope="module")
def human() -> list[str]:
    """320 passages of 500 characters from books, in random order."""
    found = []
    for book in sorted(CORPUS.glob("*.txt.gz")):
        text = " ".join(gzip.decompress(book.read_bytes()).decode("utf-8")[20_000:60_000].split())
        found += [text[i : i + 500] for i in range(0, len(text) - 500, 500)]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:320]]


@pytest.fixture(scope="module")
def machine(scorer: ModelScorer) -> list[str]:
    """20 texts of the bundled model at a low temperature, whose tokens are likelier than a human's."""
    torch.manual_seed(0)
    prompt = torch.full((20, 1), scorer.model.config.bos_token_id)
    ids = scorer.model.generate(prompt, do_sample=True, temperature=0.5, max_new_tokens=120, top_k=0)
    return list(scorer.tokenizer.batch_decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def calibration(scorer: ModelScorer, human: list[str]) -> Calibration:
    return calibrate(human[:200], scorer, score="log_perplexity", level=0.01)


def test_human_texts_keep_the_level_and_machine_texts_are_found(
    scorer: ModelScorer, human: list[str], machine: list[str], calibration: Calibration
) -> None:
    # One calibration set: 120 texts at 10 %, with the spread of the calibration itself (Beta), false alarm 1e-4.
    pvalues = np.array([result.pvalue for result in human_tests(human[200:], calibration, scorer)])
    assert np.sum(pvalues <= 0.1) <= stats.betabinom.isf(1e-4, 120, 20, 181)
    found = human_tests(machine, calibration, scorer)
    assert np.median([result.pvalue for result in found]) == pytest.approx(1 / 201)
    assert found[0].statistic < 5
    assert found[0].alternative == "less"
    assert "calibration texts (all texts)" in found[0].null
    assert any(calibration.id in line for line in found[0].assumptions)
    assert any("not the probability that a person cheated" in line for line in found[0].assumptions)
    # Near-miss: the same texts judged by the machine's own scores as calibration.
    with pytest.warns(UserWarning, match="180 of 200 calibration texts repeat another one"):
        wrong = calibrate(machine * 10, scorer, score="log_perplexity")
    rejected = [result.pvalue <= 0.1 for result in human_tests(human[200:], replace_direction(wrong), scorer)]
    assert np.sum(rejected) > stats.betabinom.isf(1e-4, 120, 20, 181)


def replace_direction(calibration: Calibration) -> Calibration:
    model = type(calibration.p_values)(**calibration.p_values.get_params() | {"alternative": "greater"})
    return replace(calibration, p_values=model.fit(calibration.scores, calibration.groups))


@pytest.mark.parametrize("score", sorted(set(LARGER_MEANS_LLM) - {"binoculars"}))
def test_every_score_can_be_calibrated_and_saved(
    scorer: ModelScorer, human: list[str], score: str, tmp_path: Path
) -> None:
    made = calibrate(human[:40], scorer, score=score, level=0.2, guarantee="simes")
    made.save(tmp_path / "c.json")
    read = Calibration.load(tmp_path / "c.json")
    assert read.id == made.id
    tests = human_tests(human[40:43], read, scorer)
    assert tests == human_tests(human[40:43], made, scorer)
    assert TestResult.from_dict(json.loads(json.dumps(tests[0].to_dict()))) == tests[0]
    assert not any(text[:60] in (tmp_path / "c.json").read_text() for text in human[:40])


def test_two_models(scorer: ModelScorer, human: list[str]) -> None:
    second = ModelScorer(load_model().to(torch.bfloat16), scorer.tokenizer)
    made = calibrate(human[:30], scorer, score="binoculars", other=second)
    assert len(human_tests(human[30:32], made, scorer, other=second)) == 2
    with pytest.raises(CalibrationError, match="was computed with 2 models, got 1"):
        human_tests(human[30:32], made, scorer)
    with pytest.raises(CalibrationError, match=r"other is not the one.*dtype"):
        human_tests(human[30:32], made, scorer, other=scorer)
    with pytest.raises(ValueError, match="other must be given for score 'binoculars'"):
        calibrate(human[:30], scorer, score="binoculars")


def test_another_scorer_is_refused(scorer: ModelScorer, human: list[str], calibration: Calibration) -> None:
    changed = load_model()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    for other, what in (
        (ModelScorer(changed, scorer.tokenizer), "weights_sha256"),
        (ModelScorer(load_model(), scorer.tokenizer, window=128), "window, stride"),
        (ModelScorer(load_model(dtype="bfloat16"), scorer.tokenizer), "weights_sha256, dtype"),
        (ModelScorer(load_model(), scorer.tokenizer, add_bos=False), "bos"),
    ):
        with pytest.raises(CalibrationError, match=f"'default'\\): {what} differ"):
            human_tests(human[:1], calibration, other)
    fresh = ModelScorer(load_model(), scorer.tokenizer)
    assert human_tests(human[:1], calibration, fresh) == human_tests(human[:1], calibration, scorer)


def test_groups_and_length_bins(scorer: ModelScorer, human: list[str]) -> None:
    groups = ["a" if i % 2 else "b" for i in range(80)]
    short = [text[:200] if i % 4 < 2 else text for i, text in enumerate(human[:80])]
    made = calibrate(short, scorer, groups=groups, length_edges=[80], level=0.1)
    assert made.group_names() == [
        "a, 0 to 79 tokens", "a, 80 tokens and more", "b, 0 to 79 tokens", "b, 80 tokens and more",
    ]  # fmt: skip
    (result,) = human_tests([human[90]], made, scorer, groups=["b"])
    assert "(b, 80 tokens and more)" in result.null
    with pytest.raises(ValueError, match="groups must be given if and only if"):
        human_tests([human[90]], made, scorer)
    with pytest.raises(ValueError, match=r"among the calibrated ones \['a', 'b'\], got 'c'"):
        human_tests([human[90]], made, scorer, groups=["c"])
    with pytest.raises(ValueError, match="needs at least 99 calibration texts"):
        calibrate(short, scorer, groups=groups, level=0.01)
    with pytest.raises(ValueError, match="positive and ascending"):
        length_groups(None, np.array([3]), (5, 5))


def test_a_length_that_was_not_calibrated_is_not_tested(scorer: ModelScorer, human: list[str]) -> None:
    """One such text says nothing, and keeps none of the others from being tested."""
    groups = ["news, local"] * 30
    made = calibrate(human[:30], scorer, groups=groups, length_edges=[10_000])
    plain = human_tests(human[40:42], made, scorer, groups=groups[:2])
    assert made.group_names() == ["news, local, 0 to 9999 tokens"]
    only_short = calibrate([text[:130] for text in human[:30]], scorer, length_edges=[80])
    assert only_short.group_names() == ["0 to 79 tokens"]
    long, short = human_tests([human[40], human[41][:130]], only_short, scorer)
    assert (long.pvalue, long.log_evalue, long.n_scored) == (1.0, 0.0, 0)
    assert "Not tested" in long.assumptions[0]
    assert "of a length that was not calibrated" in long.sentence()
    assert short.n_scored > 0
    assert not any("Not tested" in line for line in (*short.assumptions, *plain[0].assumptions))


def test_short_texts_say_nothing(scorer: ModelScorer, calibration: Calibration) -> None:
    for text in ("", "Too short."):
        (result,) = human_tests([text], calibration, scorer)
        assert (result.pvalue, result.n_scored, result.statistic) == (1.0, 0, 0.0)
        assert "says nothing either way" in result.sentence()
        assert result.log_evalue == 0.0
    assert human_tests([], calibration, scorer) == []
    with pytest.raises(ValueError, match="at least 20 tokens, got none"):
        calibrate(["short"], scorer)


def test_texts_and_groups_that_do_not_fit_are_named(
    scorer: ModelScorer, calibration: Calibration, human: list[str]
) -> None:
    """One string is a sequence of its characters, each too short: without the check it would pass as human."""
    with pytest.raises(ValueError, match="texts must be a sequence of strings, got one string"):
        human_tests(human[0], calibration, scorer)
    with pytest.raises(ValueError, match=r"groups must hold one group per text \(2\), got 1"):
        calibrate(human[:2], scorer, groups=["a"])


@given(st.floats(1e-12, 1.0))
@settings(deadline=None)  # the machine may be busy
def test_e_values_are_the_mixture_of_calibrators(p: float) -> None:
    expected, _ = integrate.quad(lambda k: k * p ** (k - 1), 0.0, 1.0, epsabs=0, epsrel=1e-10, limit=200)
    assert p_to_log_e(p) == pytest.approx(math.log(expected), abs=1e-6)


def test_e_values_have_mean_at_most_one() -> None:
    # The integral over p is 1; over the grid 1/1000 .. 1 of a conformal p-value it is below.
    grid = np.arange(1, 1001) / 1000
    assert np.mean([math.exp(p_to_log_e(p)) for p in grid]) <= 1.0
    with pytest.raises(ValueError, match="pvalue must be in"):
        p_to_log_e(0.0)


def test_files_that_are_no_calibration(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    calibration.save(path)
    whole = path.read_text()
    for content, message in (
        ("not json", "it is not JSON"),
        ("[]", "it holds a list"),
        ("{}", "is damaged: 'schema'"),
        (whole.replace('"schema": "assay.calibration/1"', '"schema": "assay.calibration/9"'), "A newer Assay"),
        (whole.replace('"min_tokens": 20', '"min_tokens": 2'), "its hash does not match"),
        (whole.replace('"level": 0.01', '"level": 7'), "level must be in"),
    ):
        assert content != whole
        path.write_text(content)
        with pytest.raises(CalibrationError, match=message):
            Calibration.load(path)


def test_commands(human: list[str], machine: list[str], tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "domain": "ab"[i % 2]}) for i, text in enumerate(human[:60])]
    (tmp_path / "human.jsonl").write_text("\n".join([*lines, "broken"]) + "\n")
    runner, saved = CliRunner(), str(tmp_path / "c.json")
    made = runner.invoke(
        app,
        ["calibrate", str(tmp_path / "human.jsonl"), "--out", saved, "--score", "log_perplexity",
         "--group-column", "domain", "--guarantee", "simes", "--level", "0.2"],
    )  # fmt: skip
    assert made.exit_code == 3, made.output
    assert "line 61" in made.stderr
    summary = json.loads(made.stdout)
    assert summary["groups"] == {"a": 30, "b": 30}
    assert summary["smallest_pvalues"] == {"a": pytest.approx(0.142, abs=1e-3), "b": pytest.approx(0.142, abs=1e-3)}
    assert summary["id"] == Calibration.load(saved).id

    texts = [json.dumps({"id": i, "text": text, "domain": "a"}) for i, text in enumerate([*machine[:6], human[70]])]
    (tmp_path / "new.jsonl").write_text("\n".join(texts) + "\n")
    options = ["--null", "human", "--calibration", saved, "--source-column", "domain", "--id-column", "id"]
    found = runner.invoke(app, ["detect", str(tmp_path / "new.jsonl"), *options, "--fdr", "0.2"])
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["doc_id"] for row in rows] == [str(i) for i in range(7)]
    assert [row["flagged"] for row in rows] == [True] * 6 + [False]
    assert rows[0]["pvalue"] == pytest.approx(math.exp(rows[0]["log_pvalue"]))

    for arguments, message in (
        (["detect", "x.txt", "--null", "human"], "go together"),
        (["detect", "x.txt", "--null", "alien"], "--null must be"),
        (["detect", "x.txt"], "give --key ID"),
        (["detect", "x.txt", "--key", "a", "--null", "human", "--calibration", saved], "--key is for marks"),
        (
            ["detect", "x.txt", *options, "--temperature", "0.7", "--tokenizer", "y"],
            "--tokenizer, --temperature cannot go",
        ),
        (["detect", str(tmp_path / "new.jsonl"), *options, "--fdr", "2"], "fdr must be in (0, 1), got 2.0"),
        (["calibrate", str(tmp_path / "human.jsonl"), "--out", saved, "--text-column", "body"], "none of 61 rows"),
        (["calibrate", str(tmp_path / "nothing.txt"), "--out", saved], "nothing.txt"),
        (
            ["calibrate", str(tmp_path / "human.jsonl"), "--out", saved, "--guarantee", "simes"],
            "needs about 90 or more",
        ),
        (["calibrate", str(tmp_path / "human.jsonl"), "--out", saved, "--score", "x"], "score must be one of"),
        (["calibrate", str(tmp_path / "human.jsonl"), "--out", saved, "--length-edges", "a"], "--length-edges must be"),
    ):
        refused = runner.invoke(app, arguments)
        assert refused.exit_code in (1, 2), refused.output
        assert message in " ".join(refused.output.replace("│", " ").split())


def test_commands_on_odd_texts(human: list[str], tmp_path: Path) -> None:
    """Short and empty texts, copies, line ends of Windows, no Latin letter: said on stderr, and nothing is lost."""
    passages = [text[:250] for text in human[:30]]
    odd = ["", " ", "Short.", passages[0], passages[1].replace(" ", "\r\n"), "Было уже поздно, и мы пошли домой. " * 3]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in passages + odd]
    (tmp_path / "human.jsonl").write_bytes("\r\n".join(lines).encode())
    runner, saved = CliRunner(), str(tmp_path / "new folder" / "c.json")
    made = runner.invoke(app, ["calibrate", str(tmp_path / "human.jsonl"), "--out", saved])
    assert made.exit_code == 0, made.output
    assert "3 of 36 texts have fewer than 20 tokens and were left out" in made.stderr
    assert "1 of 33 calibration texts repeat another one" in made.stderr
    summary = json.loads(made.stdout)
    assert (summary["texts"], summary["left_out"], summary["rejects"]) == (33, 3, 0)

    found = runner.invoke(app, ["detect", str(tmp_path / "human.jsonl"), "--null", "human", "--calibration", saved])
    assert found.exit_code == 0, found.output
    assert "3 of 36 texts were not tested" in found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["n_scored"] == 0 for row in rows] == [False] * 30 + [True] * 3 + [False] * 3
    assert all(row["pvalue"] == 1.0 for row in rows[30:33])

    text = "\ufeff" + passages[3]
    piped = runner.invoke(app, ["detect", "-", "--null", "human", "--calibration", saved], input=text.encode())
    assert piped.exit_code == 0, piped.output
    assert json.loads(piped.stdout)["log_pvalue"] == pytest.approx(rows[3]["log_pvalue"])
    (tmp_path / "mixed.jsonl").write_text("\n".join([lines[0], *["broken"] * 12]))
    some = runner.invoke(app, ["detect", str(tmp_path / "mixed.jsonl"), "--null", "human", "--calibration", saved])
    assert some.exit_code == 3
    assert some.stderr.count("mixed.jsonl, line") == 10
    assert "2 more rows could not be read" in some.stderr
