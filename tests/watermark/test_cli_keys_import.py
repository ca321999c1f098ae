"""`assay keys import`: another system's key comes from a file or a hidden prompt, and is shown nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from assay._cli_keys import keys_app
from assay.watermark import schemes
from assay.watermark.keyring import Keyring
from assay.watermark.keys import integers_of
from assay.watermark.profiles import hf_kgw, hf_synthid, sglang_gumbel

SECRET = "8451632907"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module, scheme in ((hf_kgw, "hf-kgw"), (hf_synthid, "hf-synthid"), (sglang_gumbel, "sglang-gumbel")):
        monkeypatch.setitem(schemes._HOMES, scheme, module.__name__)
    path = tmp_path / "keyring.json"
    Keyring.create(path, passphrase="open sesame", scrypt_n=2**10)
    monkeypatch.setenv("ASSAY_KEYRING", str(path))
    monkeypatch.setenv("ASSAY_PASSPHRASE", "open sesame")
    return path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(keys_app, ["import", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert SECRET not in result.output
    return result.exit_code, result.output


def test_from_a_file(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text(f"{SECRET}\n")
    code, output = run(
        "--scheme", "hf-kgw", "--set", "vocab_size=50257", "--id", "a", "--secret-file", str(secret), "--json"
    )
    assert code == 0
    assert json.loads(output[output.index("{") :])["parameters"]["vocab_size"] == 50257
    key = Keyring.open(path, passphrase="open sesame")["a"]
    assert integers_of(key) == (int(SECRET),)


def test_hexadecimal_and_several(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("a1b2c3d4e5f60718, 10")
    assert run("--scheme", "sglang-gumbel", "--set", "keys=dual", "--id", "s", "--secret-file", str(secret))[0] == 0
    assert integers_of(Keyring.open(path, passphrase="open sesame")["s"]) == (0xA1B2C3D4E5F60718, 16)


@pytest.mark.parametrize(
    ("text", "arguments", "code", "message"),
    [
        (f"{SECRET} {SECRET}", ("--scheme", "hf-kgw", "--set", "vocab_size=50257"), 2, "integers must be 1"),
        (f"{SECRET}x", ("--scheme", "hf-kgw", "--set", "vocab_size=50257"), 2, "number 1 is not"),
        (f"-{SECRET}", ("--scheme", "hf-kgw", "--set", "vocab_size=50257"), 2, "number 1 is not"),
        (SECRET, ("--scheme", "gumbel"), 2, "another system's scheme"),
        (SECRET, ("--scheme", "nope"), 2, "scheme must be one of"),
        ("\xff" * 9, ("--scheme", "hf-kgw", "--set", "vocab_size=50257"), 2, "number 1 is not"),
        ("1 " * 40000, ("--scheme", "hf-kgw", "--set", "vocab_size=50257"), 2, "at most 65536 bytes"),
    ],
)
def test_refused(path: Path, tmp_path: Path, text: str, arguments: tuple[str, ...], code: int, message: str) -> None:
    secret = tmp_path / "key"
    secret.write_bytes(text.encode("latin-1"))
    before = path.read_bytes()
    got, output = run(*arguments, "--secret-file", str(secret))
    assert got == code
    assert message in " ".join(output.replace("│", " ").split())
    assert path.read_bytes() == before


def test_without_a_file_or_a_terminal(path: Path) -> None:
    code, output = run("--scheme", "hf-kgw", "--set", "vocab_size=50257")
    assert code == 2
    assert "no terminal to ask on" in output
    assert run("--scheme", "hf-kgw", "--set", "vocab_size=50257", "--secret-file", str(path.parent / "none"))[0] == 2
