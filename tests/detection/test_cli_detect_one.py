"""`assay detect FILE` on one text: with the model and the prompt, from stdin, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import assay
from assay.cli import app
from assay.watermark.keys import SecretKey


@pytest.fixture
def command(tmp_path: Path, make_key: Callable[..., SecretKey]) -> Callable[..., object]:
    path = tmp_path / "keyring.json"
    with pytest.warns(UserWarning, match="not encrypted"):
        assay.Keyring.create(path, development=True).add(make_key(0))

    def run(*arguments: str, stdin: str | bytes | None = None) -> object:
        return CliRunner().invoke(app, ["detect", *arguments, "--key", "test-0", "--keyring", str(path)], input=stdin)

    return run


def test_one_text_with_the_model_and_its_prompt(
    command: Callable[..., object], tmp_path: Path, human_text: str, make_key: Callable[..., SecretKey]
) -> None:
    text, prompt = tmp_path / "text.txt", tmp_path / "prompt.txt"
    text.write_text(human_text[5000:6000], encoding="utf-8")
    prompt.write_text(human_text[4900:5000], encoding="utf-8")
    done = command(str(text), "--model", "default", "--prompt-file", str(prompt), "--temperature", "0.7", "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    expected = assay.detect(
        human_text[5000:6000], make_key(0), model="default", prompt=human_text[4900:5000], temperature=0.7
    )
    assert shown["log_pvalue"] == pytest.approx(expected.log_pvalue)
    assert shown["test"] == "gumbel-best-of-three"


def test_stdin(command: Callable[..., object], human_text: str) -> None:
    done = command("-", "--json", stdin=human_text[:3000])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["n_tokens"] > 500


def test_json_names_the_pvalue_and_says_the_sentence(
    command: Callable[..., object], tmp_path: Path, human_text: str, make_key: Callable[..., SecretKey]
) -> None:
    (tmp_path / "a.txt").write_text(human_text[:2000], encoding="utf-8")
    shown = json.loads(command(str(tmp_path / "a.txt"), "--json").stdout)
    expected = assay.detect(human_text[:2000], make_key(0))
    assert shown["pvalue"] == pytest.approx(expected.pvalue)
    assert shown["sentence"] == expected.sentence()
    assert assay.TestResult.from_dict(shown).log_pvalue == shown["log_pvalue"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("missing.txt",), 1, "error: missing.txt: No such file or directory"),
        (("x.txt", "--temperature", "0.7"), 2, "--temperature is for --model"),
        (("-", "--out", "run"), 2, "- is one text"),
    ],
)
def test_what_cannot_be_is_said(
    command: Callable[..., object], arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = command(*arguments)
    assert done.exit_code == code
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_a_packed_text(command: Callable[..., object], tmp_path: Path, human_text: str) -> None:
    path, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    path.write_text(human_text[:2000], encoding="utf-8")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    plain, same = (command(str(one), "--json") for one in (path, packed))
    assert same.exit_code == 0, same.output
    assert same.stdout == plain.stdout
    packed.write_bytes(packed.read_bytes()[:-9])
    done = command(str(packed))
    assert done.exit_code == 1
    assert "cannot be unpacked" in " ".join(done.stderr.split())


def test_a_corpus_takes_no_prompt(command: Callable[..., object], tmp_path: Path) -> None:
    done = command("x.jsonl", "--out", str(tmp_path / "out"), "--model", "default", "--prompt-file", "prompt.txt")
    assert done.exit_code == 2
    assert "one text" in " ".join(done.stderr.split())


def test_bytes_that_are_not_utf8_are_refused(command: Callable[..., object], tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    done = command(str(path))
    assert done.exit_code == 1
    assert "byte 0xE9 at position 3" in " ".join(done.stderr.split())
