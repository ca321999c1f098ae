"""Reports on corpus runs: the run's numbers, excerpts re-read and checked, the commands, the page in a browser."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

import assay
from assay import cli
from assay._errors import RunError
from assay.conformal import monitor_scores
from assay.detection.corpus import run
from assay.detection.text import load_tokenizer
from assay.kernels import prf
from assay.report import Report, verify
from assay.report.excerpts import excerpt_of
from assay.watermark.gumbel import GumbelConfig, pivots, sum_scores
from assay.watermark.keyring import Keyring
from assay.watermark.keys import SecretKey, use_key
from assay.watermark.signing import Ed25519Config

MADE = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
MARKED = {"m0": "<script>alert('m0')</script>", "m1": "plain", "m2": "wire"}


def marked_text(key: SecretKey, seed: int, words: int = 90) -> str:
    """Words that are one token each, every one the best under the key of 8 random candidates: a strong mark."""
    vocabulary = load_tokenizer().backend.get_vocab().items()
    usable = sorted((v, w[1:]) for w, v in vocabulary if w[0] == "\u0120" and w[1:].isalpha() and len(w) > 3)
    rng = np.random.default_rng(seed)
    chosen = [usable[i] for i in rng.integers(len(usable), size=4)]
    while len(chosen) < words:
        candidates = [usable[i] for i in rng.integers(len(usable), size=8)]
        contexts = np.tile(np.array([[v for v, _ in chosen[-4:]]], dtype=np.uint32), (8, 1))
        drawn = prf.words_at(use_key(key), contexts, np.array([v for v, _ in candidates], dtype=np.uint32))
        chosen.append(candidates[int(np.argmin(drawn))])
    return " " + " ".join(word for _, word in chosen)


@pytest.fixture(scope="module")
def key() -> SecretKey:
    return SecretKey(bytes(range(32)), id="newsroom", config=GumbelConfig(), created=MADE)


@pytest.fixture(scope="module")
def place(tmp_path_factory, key: SecretKey, human_text: str) -> Path:
    """A folder with two inputs and `run/`, the results of testing them."""
    folder = tmp_path_factory.mktemp("audit")
    passages = [human_text[500 * i : 500 * i + 60 * (1 + i % 12)] for i in range(40)]
    rows = [{"id": f"h{i}", "text": passage, "from": "human"} for i, passage in enumerate(passages)]
    marked = [{"id": name, "text": marked_text(key, i), "from": MARKED[name]} for i, name in enumerate(MARKED)]
    rows = [*rows[:5], *marked, *rows[5:], {"id": "empty", "text": "", "from": None}]
    lines = [json.dumps(row) for row in rows]
    (folder / "a.jsonl").write_text("\n".join([*lines[:20], "{broken", *lines[20:]]) + "\n")
    (folder / "b.jsonl").write_text(json.dumps({"id": "é\u202e", "text": "Caf\u00e9 " * 9, "from": "human"}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(["a.jsonl", "b.jsonl"], key, out="run", id_column="id", source_column="from", workers=1, progress=False)
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_report_on_a_run_has_the_runs_numbers(inside: Path, key: SecretKey) -> None:
    report = Report.from_run("run", keys=key, listed=99, made=MADE)
    table = {row["doc_id"]: row for row in parquet.read_table("run/results.parquet").to_pylist()}
    summary = json.loads((inside / "run" / "summary.json").read_text())
    assert (report.counts.documents, report.counts.flagged, report.fdr) == (45, summary["flagged"], summary["fdr"])
    assert (report.counts.tested, report.counts.rejected) == (44, 1)
    assert [(one.reason, one.rows) for one in report.rejects] == [("invalid JSON", 1)]
    assert {one.doc_id for one in report.documents if one.flagged} == {"m0", "m1", "m2"}
    assert len(report.documents) == len(table) == 45
    for one in report.documents:
        row = table[one.doc_id]
        for name in ("source", "file", "row", "n_tokens", "n_scored", "n_repeats_dropped", "statistic", "flagged"):
            assert getattr(one, name) == (row[name] if name != "source" else row[name] or "(no source)")
        for name in ("log_pvalue", "log_qvalue", "log_evalue"):
            assert getattr(one, name) == row[name]
    assert {(one.source, one.documents) for one in report.sources} >= {("human", 41)}
    assert [one.name for one in report.inputs] == ["a.jsonl", "b.jsonl"]
    assert [one.name for one in report.outputs] == ["results.parquet", "inputs.jsonl", "rejects.jsonl", "summary.json"]
    for one, path in [
        *((one, one.name) for one in report.inputs),
        *((one, f"run/{one.name}") for one in report.outputs),
    ]:
        assert (one.sha256, one.size) == (
            hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            Path(path).stat().st_size,
        )
    assert report.tokenizer is not None
    assert report.tokenizer.sha256 == load_tokenizer().sha256
    assert [(one.id, one.fingerprint, one.flagged) for one in report.keys] == [("newsroom", key.info.fingerprint, 3)]
    assert Report.from_json(report.to_json()) == report
    assert Report.from_run("run", keys=key, listed=99, made=MADE).to_json() == report.to_json()


def test_excerpts_are_the_flagged_texts_with_the_scores_of_the_test(inside: Path, key: SecretKey) -> None:
    report = Report.from_run("run", keys=[key], excerpts=10)
    shown = {one.doc_id: one for one in report.documents if one.excerpt}
    assert shown.keys() == {"m0", "m1", "m2"}
    for i, name in enumerate(MARKED):
        document = shown[name]
        assert document.excerpt is not None
        assert "".join(document.excerpt.pieces) == marked_text(key, i)
        counted = [tail for tail in document.excerpt.log_tail if tail is not None]
        assert len(counted) == document.n_scored
        assert -math.fsum(counted) == pytest.approx(document.statistic, rel=1e-12)
    two = Report.from_run("run", keys=key, excerpts=2)
    assert [one.doc_id for one in two.documents if one.excerpt] == [one.doc_id for one in two.documents[:2]]


def test_no_excerpts_without_keys_or_when_none_are_wanted(inside: Path, key: SecretKey) -> None:
    assert b'"pieces"' in Report.from_run("run", keys=key).to_json()
    for report in (Report.from_run("run", keys=key, excerpts=0), Report.from_run("run")):
        assert all(one.excerpt is None for one in report.documents)
        assert b'"pieces"' not in report.to_json()
        assert "This report holds no text of any document." in report.to_html()


def test_a_run_and_its_monitored_sources_share_a_report(inside: Path) -> None:
    scores = np.random.default_rng(8).normal(size=260)
    watched = monitor_scores(scores, reference=200, random_state=8)
    report = Report.from_run("run", made=MADE, monitoring=[("desk", watched)])
    assert report.monitoring[0].scores == tuple(scores[200:].tolist())
    assert replace(report, monitoring=()) == Report.from_run("run", made=MADE)


def test_another_fdr_changes_the_flags(inside: Path) -> None:
    assert Report.from_run("run", fdr=1e-30).counts.flagged < 3
    assert Report.from_run("run", fdr=0.9999).counts.flagged > 3
    for bad in (0, 1, 2.0):
        with pytest.raises(ValueError, match=r"fdr must be in \(0, 1\)"):
            Report.from_run("run", fdr=bad, keys=SecretKey.generate())


def test_a_changed_input_a_wrong_key_or_tokenizer_shows_no_text(
    inside: Path, key: SecretKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="keys must hold the run's key 'newsroom'"):
        Report.from_run("run", keys=SecretKey(b"x" * 32, id="newsroom", config=GumbelConfig()))
    with pytest.raises(ValueError, match="keys must hold the run's key"):
        Report.from_run("run", keys=[])
    with pytest.raises(ValueError, match="excerpts must be an integer of at least 0, got -1"):
        Report.from_run("run", keys=key, excerpts=-1)
    other = json.loads(load_tokenizer().backend.to_str())
    other["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="tokenizer must be the run's"):
        Report.from_run("run", keys=key, tokenizer=str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(inside, copy)
    monkeypatch.chdir(copy)
    lines = (copy / "a.jsonl").read_text().splitlines()
    word = marked_text(key, 1).split()[40]
    changed = [*lines[:6], lines[6].replace(word, word[::-1]), *lines[7:]]
    (copy / "a.jsonl").write_text("\n".join(changed) + "\n")
    with pytest.raises(RunError, match=r"'a.jsonl', row 7, is no longer what the run tested"):
        Report.from_run("run", keys=key)
    (copy / "a.jsonl").write_text("\n".join(lines[:6]) + "\n")
    with pytest.raises(RunError, match=r"row [78], is no longer a document"):
        Report.from_run("run", keys=key)
    (copy / "a.jsonl").unlink()
    with pytest.raises(RunError, match=r"excerpts need the run's input 'a.jsonl'"):
        Report.from_run("run", keys=key)
    assert Report.from_run("run", keys=key, excerpts=0).counts.flagged == 3


def test_what_is_no_finished_run_is_refused(inside: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no summary of a finished run"):
        Report.from_run(tmp_path)
    copy = tmp_path / "run"
    shutil.copytree("run", copy)
    (copy / "results.parquet").write_bytes(b"not parquet")
    with pytest.raises(RunError, match="is not the table of a corpus run"):
        Report.from_run(copy)
    shutil.copyfile("run/results.parquet", copy / "results.parquet")
    (copy / "inputs.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="is not the list of inputs"):
        Report.from_run(copy)


def test_identities_come_from_the_right_row_groups(inside: Path, tmp_path: Path) -> None:
    # Row groups of 7 instead of 65536, so that the listed rows lie in many of them.
    copy = tmp_path / "run"
    shutil.copytree("run", copy)
    table = parquet.read_table("run/results.parquet")
    parquet.write_table(table, copy / "results.parquet", row_group_size=7)
    assert Report.from_run(copy, listed=99).documents == Report.from_run("run", listed=99).documents


def test_pieces_join_to_the_text_even_inside_characters(key: SecretKey) -> None:
    text = "na\u00efve \U0001f9ea\U0001f3fd caf\u00e9\r\n\t\u202etail \u65e5\u672c\u8a9e \u0301 end"
    tokenizer = load_tokenizer()
    excerpt = excerpt_of("d", text, tokenizer, key)
    ids = tokenizer.encode(text)
    assert "".join(excerpt.pieces) == text
    assert len(excerpt.pieces) == len(ids)
    assert "" in excerpt.pieces  # a character of several tokens goes to the first of them
    found = pivots(ids, key)
    expected = dict(zip(found.positions.tolist(), (-sum_scores(found.words)).tolist(), strict=True))
    assert {i: tail for i, tail in enumerate(excerpt.log_tail) if tail is not None} == expected


@pytest.fixture
def keyring(tmp_path: Path, key: SecretKey) -> Path:
    path = tmp_path / "keyring.json"
    with pytest.warns(UserWarning, match="development"):
        made = Keyring.create(path, development=True)
    made.add(key)
    made.new("office", Ed25519Config())
    made.new("other-office", Ed25519Config())
    return path


def assay_command(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_commands_from_run_to_verified_report(inside: Path, keyring: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    options = ("--out", out, "--title", "T <1>", "--sign-with", "office", "--keyring", keyring)
    code, stdout, _ = assay_command("report", "run", *options)
    assert code == 0
    told = json.loads(stdout)
    assert told["verdict"].startswith("3 of 44 tested documents")
    assert told["page"] == str(out / "report.html")
    report = Report.from_json((out / "report.json").read_bytes())
    assert report.title == "T <1>"
    assert sum(one.excerpt is not None for one in report.documents) == 3
    assay_command("keys", "export-public", "--keyring", keyring, "--out", tmp_path / "public.json")
    keys = {one["id"]: one for one in json.loads((tmp_path / "public.json").read_text())["keys"]}
    public = keys["office"]["public_key"]
    (tmp_path / "key.txt").write_text(public.upper() + "\n")
    for given in (public, tmp_path / "key.txt", tmp_path / "public.json"):
        code, stdout, _ = assay_command("verify", out, "--public-key", given)
        assert (code, json.loads(stdout)["signer_checked"]) == (0, True)
    code, stdout, _ = assay_command("verify", out)
    assert code == 0
    assert "SIGNER NOT CHECKED" in stdout
    code, stdout, _ = assay_command("verify", out, "--public-key", keys["other-office"]["public_key"])
    assert code == 1
    with (out / "report.html").open("ab") as file:
        file.write(b" ")
    code, stdout, _ = assay_command("verify", out, "--public-key", public)
    assert code == 1
    assert json.loads(stdout)["problems"][0].startswith("report.html: changed")
    assert assay_command("verify", out / "report.json", "--public-key", public)[0] == 0


def test_command_without_keyring_makes_an_unsigned_report_without_text(inside: Path, tmp_path: Path) -> None:
    code, stdout, stderr = assay_command("report", "run", "--out", tmp_path / "r", "--keyring", tmp_path / "none.json")
    assert code == 0
    assert "shows no excerpts" in stderr
    assert "not signed" in stderr
    assert json.loads(stdout)["signed_with"] is None
    code, stdout, _ = assay_command("verify", tmp_path / "r")
    assert code == 1
    assert "the report is not signed" in stdout


def test_an_unsigned_report_takes_no_signed_ones_place(inside: Path, keyring: Path, tmp_path: Path) -> None:
    signed = ("report", "run", "--out", tmp_path / "r", "--keyring", keyring, "--sign-with", "office")
    unsigned = signed[:-2]
    assert assay_command(*signed)[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "r").iterdir()}
    code, _, stderr = assay_command(*unsigned)
    assert code == 1
    assert "holds a signed report" in stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "r").iterdir()} == before
    assert assay_command(*signed)[0] == 0
    assert assay_command("verify", tmp_path / "r")[0] == 0
    assert assay_command(*unsigned, "--force")[0] == 0
    assert assay_command("verify", tmp_path / "r")[0] == 1


def test_command_refusals_have_their_exit_codes(inside: Path, keyring: Path, tmp_path: Path) -> None:
    ring = ("--keyring", keyring)
    out = ("--out", tmp_path / "r")
    assert assay_command("report", tmp_path, *out, *ring)[0] == 1  # no run there
    assert assay_command("report", "run", *out, "--sign-with", "unknown", *ring)[0] == 1
    assert assay_command("report", "run", *out, "--sign-with", "newsroom", *ring)[0] == 2  # a watermark key
    assert assay_command("report", "run", *out, "--excerpts", "-1", *ring)[0] == 2
    assert assay_command("report", "run", *out, "--fdr", "1.5", *ring)[0] == 2
    assert assay_command("report", tmp_path / "absent", *out)[0] == 2
    assert assay_command("report", "run")[0] == 2
    assert not (tmp_path / "r").exists()
    assert assay_command("verify", tmp_path / "absent")[0] == 2
    assert assay_command("verify", tmp_path, "--public-key", "xyz")[0] == 2
    assert assay_command("verify", tmp_path, "--public-key", tmp_path)[0] == 2
    (tmp_path / "empty.json").write_text('{"keys": []}')
    assert assay_command("verify", tmp_path, "--public-key", tmp_path / "empty.json")[0] == 2
    assert assay_command("verify", tmp_path)[0] == 1  # a folder without a report


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def rendered(page: Path, folder: Path) -> tuple[np.ndarray, str]:
    """Pixels of the page, uint8 of shape (height, width, 3), and what the browser wrote to its log."""
    from PIL import Image

    picture = folder / "page.png"
    assert CHROMIUM is not None
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --window-size=1280,900"
    )
    arguments = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", page.as_uri()]
    command = [CHROMIUM, *options.split(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB")), done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed, so the page is not looked at in a browser")
def test_page_renders_in_a_browser_under_its_own_policy(inside: Path, key: SecretKey, tmp_path: Path) -> None:
    page = Report.from_run("run", keys=key, made=MADE).save(tmp_path / "report")
    pixels, log = rendered(page, tmp_path / "good")
    # The style sheet and the picture's classes were applied: paper and bars have the style sheet's colours.
    assert pixels[5, 5].tolist() == [252, 251, 248]
    assert np.sum(np.all(pixels == (29, 92, 135), axis=2)) > 1000
    assert "CONSOLE" not in log, log
    # The near-miss: a script that somebody smuggles in is refused by the page's own policy, and the log says so.
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace("</main>", "</main><script>document.body.remove()</script>"), encoding="utf-8")
    tampered, log = rendered(page, tmp_path / "bad")
    assert "Content Security Policy" in log
    assert np.sum(np.all(tampered == (29, 92, 135), axis=2)) > 1000, "the script emptied the page"


def test_package_offers_the_report() -> None:
    assert assay.Report is Report
    assert assay.report.verify is verify
    assert os.path.exists(os.path.join(os.path.dirname(assay.report.__file__), "report.css"))
