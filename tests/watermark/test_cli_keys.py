"""`assay keys`: results on stdout, messages on stderr, exit codes, where a passphrase may come from."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from assay._cli_keyring import open_keyring
from assay._cli_keys import _table, keys_app
from assay.watermark.gumbel import GumbelConfig
from assay.watermark.keyring import Keyring, read_public
from assay.watermark.keys import SecretKey
from assay.watermark.signing import Ed25519Config, sign, verify

SECRET = bytes.fromhex("9b1e5c4d8f0a37e26d41c8b79350fa1e2c6b7d8897a4135f60e2cbd914f8a3b7")
SEED = bytes.fromhex("2d7f90c3a1b45e688c0d3f1e6a95b7c2041d8be3f7a6925c3e8b70d1f4c6a958")
PASSPHRASE = "open sesame"

Assay = Callable[..., Result]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encrypted keyring, cheap to open, named by the environment with its passphrase."""
    path = tmp_path / "keyring.json"
    keyring = Keyring.create(path, passphrase=PASSPHRASE, scrypt_n=2**10)
    keyring.add(SecretKey(SECRET, id="a", config=GumbelConfig(window=5)))
    keyring.add(SecretKey(SEED, id="s", config=Ed25519Config()))
    monkeypatch.setenv("ASSAY_KEYRING", str(path))
    monkeypatch.setenv("ASSAY_PASSPHRASE", PASSPHRASE)
    return path


@pytest.fixture
def assay(monkeypatch: pytest.MonkeyPatch) -> Assay:
    """Run a command; check that it shows neither secrets nor the passphrase, whatever it does."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, typed: str | None = None) -> Result:
        result = CliRunner().invoke(keys_app, list(arguments), input=typed)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        for secret in (SECRET, SEED):
            for form in (secret.hex()[:16], secret.hex().upper()[:16], repr(secret)[2:22], str(list(secret))[1:20]):
                assert form not in result.output
        assert PASSPHRASE not in result.output
        return result

    return run


def states(path: Path) -> dict[str, str]:
    return {info.id: info.state for info in read_public(path)}


def test_new(assay: Assay, path: Path) -> None:
    result = assay("new", "--id", "b", "--window", "7")
    assert (result.exit_code, result.stderr) == (0, "made key 'b'\n")
    info = json.loads(result.stdout)
    assert info == read_public(path)[-1].to_dict()
    assert (info["scheme"], info["parameters"], info["state"]) == ("gumbel", {"window": 7}, "active")
    assert json.loads(assay("new").stdout)["parameters"] == {"window": 4}
    assert json.loads(assay("new", "--scheme", "ed25519").stdout)["scheme"] == "ed25519"
    assert len(states(path)) == 5


def test_new_makes_the_keyring(assay: Assay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ASSAY_KEYRING", raising=False)
    monkeypatch.setenv("ASSAY_PASSPHRASE", PASSPHRASE)
    default = tmp_path / ".config" / "assay" / "keyring.json"
    # A refused key leaves no empty keyring behind.
    assert assay("new", "--id", "not an id").exit_code == 2
    assert not default.exists()
    result = assay("new")
    assert result.exit_code == 0
    assert f"made keyring {default}" in result.stderr
    assert stat.S_IMODE(default.stat().st_mode) == 0o600
    assert Keyring.open(default, passphrase=PASSPHRASE).protection == "scrypt + AES-256-GCM"


def test_ids_stay_whole_on_a_narrow_terminal() -> None:
    info = SecretKey.generate("newsroom-archive-2026").info
    shown = Console(width=50, file=StringIO())
    shown.print(_table((info,)))
    assert info.id in shown.file.getvalue()


def test_list_needs_no_passphrase(assay: Assay, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSAY_PASSPHRASE")
    result = assay("list")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    assert content["encrypted"] is True
    assert content["keys"] == [info.to_dict() for info in read_public(path)]
    assert assay("list", "--keyring", str(path.with_name("none.json"))).exit_code == 1


def test_rotate(assay: Assay, path: Path) -> None:
    result = assay("rotate", "a", "--new-id", "b")
    assert (result.exit_code, result.stderr) == (0, "retired key 'a', made key 'b'\n")
    assert json.loads(result.stdout)["parameters"] == {"window": 5}
    assert states(path) == {"a": "retired", "s": "active", "b": "active"}
    assert assay("rotate", "b").exit_code == 0
    again = assay("rotate", "a")
    assert again.exit_code == 1
    assert "error: only an active key can be rotated, key 'a' is retired" in again.stderr


def test_revoke_asks(assay: Assay, path: Path) -> None:
    for typed in ("n\n", "\n", ""):
        result = assay("revoke", "a", typed=typed)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "Revoke key 'a' (gumbel/1, active)? This cannot be undone. [y/N]" in result.stderr
        assert states(path)["a"] == "active"
    result = assay("revoke", "a", typed="y\n")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["state"] == "revoked"
    assert result.stdout.startswith("{")
    assert states(path)["a"] == "revoked"
    result = assay("revoke", "s", "--yes")
    assert (result.exit_code, result.stderr) == (0, "revoked key 's'\n")


def test_export_public(assay: Assay, path: Path, tmp_path: Path) -> None:
    result = assay("export-public")
    assert (result.exit_code, result.stderr) == (0, "")
    exported = json.loads(result.stdout)
    signer = open_keyring(path)["s"]
    public = bytes.fromhex(exported["keys"][1]["public_key"])
    assert verify(b"report", sign(b"report", signer), public)
    out = tmp_path / "public.json"
    result = assay("export-public", "--out", str(out))
    assert (result.exit_code, result.stdout) == (0, "")
    assert json.loads(out.read_text()) == exported
    assert assay("export-public", "--out", str(tmp_path / "no" / "where.json")).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["rotate", "z"], 1, "error: id must name a key of the keyring, got 'z'. Known: 'a', 's'."),
        (["revoke", "z", "--yes"], 1, "got 'z'"),
        (["new", "--id", "a"], 1, "error: id must be free"),
        (["new", "--development"], 1, "--development is for a new keyring"),
        (["list", "--keyring", __file__], 1, "it is not a keyring, or it is damaged"),
        (["export-public", "--keyring", "/nowhere/keyring.json"], 1, "there is none at"),
        (["new", "--keyring", "/dev/null/keyring.json"], 1, "error"),
        (["new", "--window", "65"], 2, "window must be an integer in [1, 64], got 65"),
        (["new", "--window", "four"], 2, "--window"),
        (["new", "--scheme", "gumble"], 2, "scheme must be one of ['"),
        (["new", "--set", "window"], 2, "--set must be NAME=VALUE, each name once, got 'window'"),
        (["new", "--window", "4", "--set", "window=5"], 2, "each name once, got 'window=5'"),
        (["new", "--set", "height=5"], 2, "parameters of 'gumbel/1' must be among ['window']"),
        (["new", "--set", "secret=0123abcd"], 2, "among ['window'], got ['secret']."),
        (["new", "--scheme", "hf-kgw"], 2, "parameters of 'hf-kgw/1' must include ['vocab_size']"),
        (["new", "--scheme", "ed25519", "--window", "4"], 2, "parameters of 'ed25519/1' must be among []"),
        (["new", "--id", "a b"], 2, "id must be 1-64 letters"),
        (["rotate"], 2, "Missing argument"),
        (["rotate", "a", "--passphrase", "x"], 2, "--passphrase"),
        (["rotate", "a", "--passphrase-file", "/nowhere"], 2, "--passphrase-file /nowhere cannot be read"),
        (["forge"], 2, "forge"),
    ],
)
def test_refusals(assay: Assay, path: Path, arguments: list[str], code: int, message: str) -> None:
    before = path.read_bytes()
    result = assay(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert path.read_bytes() == before


@pytest.mark.usefixtures("path")
def test_a_setting_of_none_as_the_messages_write_it(assay: Assay) -> None:
    for text in ("None", "null"):
        result = assay("new", "--scheme", "green-list", "--set", f"delta={text}", "--json")
        assert json.loads(result.stdout)["parameters"]["delta"] is None


def test_where_the_passphrase_comes_from(
    assay: Assay, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "passphrase"
    monkeypatch.setenv("ASSAY_PASSPHRASE", "wrong")
    result = assay("export-public")
    assert result.exit_code == 1
    assert "the passphrase is wrong, or the file is damaged" in result.stderr
    # A file comes before the environment; one line end is not part of the passphrase, a space is.
    for content in (PASSPHRASE, PASSPHRASE + "\n", PASSPHRASE + "\r\n", PASSPHRASE + "\nsecond line\n"):
        file.write_text(content, newline="")
        assert assay("export-public", "--passphrase-file", str(file)).exit_code == 0
    for content in (PASSPHRASE + " \n", "\n" + PASSPHRASE, ""):
        file.write_text(content)
        assert assay("export-public", "--passphrase-file", str(file)).exit_code == 1
    file.write_text("x" * 5000)
    assert assay("export-public", "--passphrase-file", str(file)).exit_code == 2
    monkeypatch.delenv("ASSAY_PASSPHRASE")
    result = assay("export-public")
    assert result.exit_code == 2
    assert "there is no terminal to ask on" in result.stderr


def test_bytes_that_are_no_text_are_one_passphrase(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, file = tmp_path / "other.json", tmp_path / "passphrase"
    raw = b"caf\xe9 \xff"
    monkeypatch.setenv("ASSAY_PASSPHRASE", os.fsdecode(raw))
    Keyring.create(other, passphrase=os.environ["ASSAY_PASSPHRASE"], scrypt_n=2**10)
    assert len(open_keyring(other)) == 0
    file.write_bytes(raw)
    assert len(open_keyring(other, file)) == 0


def test_development_keyrings_warn(assay: Assay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dev.json"
    monkeypatch.setenv("ASSAY_KEYRING", str(path))
    result = assay("new", "--id", "d", "--development")
    assert result.exit_code == 0
    assert "warning: keyring" in result.stderr
    assert "is not encrypted: development only" in result.stderr
    assert json.loads(result.stdout)["id"] == "d"
    secret = json.loads(path.read_text())["keys"][0]["secret"]
    monkeypatch.setenv("ASSAY_PASSPHRASE", "not needed")
    for arguments in (["list"], ["new", "--id", "e"], ["rotate", "d"], ["export-public"], ["revoke", "d", "--yes"]):
        result = assay(*arguments)
        assert result.exit_code == 0
        assert "is not encrypted: development only" in result.stderr
        json.loads(result.stdout)
        assert secret not in result.output
    path.chmod(0o644)
    assert assay("rotate", "e").exit_code == 1


def test_the_documented_commands_work(
    assay: Assay, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text(PASSPHRASE)
    page = Path(__file__).parents[2] / "docs" / "how-to" / "keys.md"
    commands = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("assay keys ")]
    assert len(commands) == 10
    for command in commands:
        line = command.partition(" | ")[0].replace("/run/secrets/assay", "secret")
        result = assay(*shlex.split(line)[2:])
        assert result.exit_code == 0, (line, result.output)
    assert "public_key" in (tmp_path / "public-keys.json").read_text()


# ---------------------------------------------------------------- on a terminal

ON_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from assay._cli_keys import keys_app
keys_app()
"""


def terminal(arguments: list[str], answers: list[tuple[str, str]], environment: dict[str, str]) -> tuple[int, str]:
    """Run a command on a terminal of its own; answer each prompt when it has appeared."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, *arguments],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "COLUMNS": "120", **environment},
    )  # fmt: skip
    os.close(slave)
    seen, pending, deadline = b"", list(answers), time.monotonic() + 30
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 0.1)
        try:
            chunk = os.read(master, 65536) if ready else b""
        except OSError:  # the other side is closed
            break
        seen += chunk
        if not ready and process.poll() is not None:
            break
        if pending and pending[0][0].encode() in seen.rpartition(b"\n")[2]:
            os.write(master, pending.pop(0)[1].encode())
    else:
        process.kill()
    code = process.wait(timeout=60)
    os.close(master)
    assert not pending, seen
    return code, seen.decode()


def test_prompts_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSAY_PASSPHRASE", raising=False)
    environment = {"ASSAY_KEYRING": str(tmp_path / "keyring.json")}
    # The space behind the colon comes when the terminal has stopped to show what is typed.
    answers = [("Passphrase: ", PASSPHRASE + "\n"), ("confirmation: ", PASSPHRASE + "\n")]
    code, seen = terminal(["new", "--id", "a"], answers, environment)
    assert code == 0
    assert "made key 'a'" in seen
    assert PASSPHRASE not in seen
    code, seen = terminal(["export-public"], [("Passphrase: ", PASSPHRASE + "\n")], environment)
    assert code == 0
    assert PASSPHRASE not in seen


def test_a_terminal_gets_a_table_or_json(path: Path) -> None:
    code, seen = terminal(["list"], [], {})
    assert code == 0
    for word in ("gumbel/1", "window=5", "ed25519/1", "active", "fingerprint", "┃"):
        assert word in seen
    code, seen = terminal(["list", "--json"], [], {})
    assert [key["id"] for key in json.loads(seen)["keys"]] == ["a", "s"]


# ---------------------------------------------------------------- for the other commands


def test_open_keyring(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert [info.id for info in open_keyring(path)] == ["a", "s"]
    path.chmod(0o644)
    open_keyring(path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "others than its owner may read or write it" in captured.err


def test_loading_the_commands_loads_no_arrays() -> None:
    heavy = ("numpy", "torch", "numba", "cryptography")
    code = f"import sys, assay._cli_keys; print([name for name in {heavy} if name in sys.modules])"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr
