"""Saving, signing, verifying: any changed byte is found, and the words say what was checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from assay._errors import RevokedKeyError
from assay.report import Report, canonical, signature, verify
from assay.watermark import signing
from assay.watermark.keys import SecretKey

FILES = ("report.html", "report.json", "report.sig.json")


@pytest.fixture(scope="module")
def original(small_report: Report, make_signer: Callable[[int], SecretKey], tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "report"
    small_report.save(folder, sign_with=make_signer(1))
    return folder


@pytest.fixture
def signed(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "report")
    return tmp_path / "report"


def test_untouched_report_is_valid(signed: Path, make_signer: Callable[[int], SecretKey]) -> None:
    public = signing.public_key(make_signer(1))
    assert sorted(os.listdir(signed)) == sorted(FILES)
    for key in (public, public.hex(), f" {public.hex().upper()}\n"):
        finding = verify(signed, key)
        assert (finding.valid, finding.signer_checked, finding.problems) == (True, True, ())
        assert finding.checked == ("report.html", "report.json")
        assert finding.key_id == "audit-office-1"
        assert finding.sentence().startswith("VALID. report.html and report.json: unchanged since signed by the")
        assert bool(finding)


def test_without_the_signers_key_only_integrity_is_claimed(signed: Path) -> None:
    finding = verify(signed)
    assert finding.valid
    assert not finding.signer_checked
    assert "SIGNER NOT CHECKED" in finding.sentence()
    assert "integrity, not who signed" in finding.sentence()


def test_report_signed_by_someone_else_is_valid_only_to_who_did_not_ask(
    signed: Path, small_report: Report, make_signer: Callable[[int], SecretKey]
) -> None:
    expected = signing.public_key(make_signer(1))
    small_report.save(signed, sign_with=make_signer(2))
    assert verify(signed).valid
    finding = verify(signed, expected)
    assert not finding.valid
    assert not finding.signer_checked
    assert "not with the expected" in finding.sentence()


def problem_after(path: Path, name: str, position: int, new: int) -> str:
    """The sentence after one byte was changed; the byte is put back."""
    with (path / name).open("r+b") as file:
        file.seek(position)
        old = file.read(1)[0]
        assert old != new
        file.seek(position)
        file.write(bytes([new]))
        file.flush()
        finding = verify(path)
        file.seek(position)
        file.write(bytes([old]))
    assert not finding.valid, (name, position, new)
    assert not finding
    return finding.sentence()


def test_every_changed_byte_of_the_json_is_found(signed: Path) -> None:
    data = (signed / "report.json").read_bytes()
    rng = np.random.default_rng(0)
    assert len(data) < 20_000
    for position, byte in enumerate(data):
        sentence = problem_after(signed, "report.json", position, byte ^ int(rng.integers(1, 256)))
        assert sentence.startswith("INVALID. report.json: changed since it was signed")
    assert verify(signed)


def test_every_changed_byte_of_the_signature_is_found(signed: Path) -> None:
    data = (signed / "report.sig.json").read_bytes()
    for position, byte in enumerate(data):
        # 0x20 changes the case of hexadecimal digits, 0x01 a digit, the rest anything.
        for flip in (0x01, 0x20, 0x80, 0xFF):
            sentence = problem_after(signed, "report.sig.json", position, byte ^ flip)
            assert sentence.startswith("INVALID. report.sig.json:")
    assert verify(signed)


def test_sampled_changed_bytes_of_the_page_are_found(signed: Path) -> None:
    data = (signed / "report.html").read_bytes()
    rng = np.random.default_rng(0)
    for position in sorted({0, len(data) - 1, *rng.integers(0, len(data), 400).tolist()}):
        sentence = problem_after(signed, "report.html", position, data[position] ^ int(rng.integers(1, 256)))
        assert sentence.startswith("INVALID. report.html: changed since it was signed")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data.replace(b"1", b"2", 1),
        lambda data: data.replace(b",", b", ", 1),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data * 2,
    ],
)
def test_longer_shorter_and_reformatted_files_are_found(signed: Path, name: str, change: Callable) -> None:
    path = signed / name
    path.write_bytes(change(path.read_bytes()))
    finding = verify(signed)
    assert not finding.valid
    assert finding.problems[0].startswith(f"{name}:")


def test_missing_and_odd_files_are_named(signed: Path) -> None:
    for name in FILES:
        copy = signed.with_name("copy")
        shutil.copytree(signed, copy)
        (copy / name).unlink()
        assert verify(copy).problems[0].startswith(f"{name}: missing")
        (copy / name).mkdir()
        assert verify(copy).problems[0].startswith(f"{name}: ")
        shutil.rmtree(copy)
    with pytest.raises(FileNotFoundError, match="nothing is at"):
        verify(signed / "absent")


def test_one_file_is_checked_against_the_signature_beside_it(signed: Path) -> None:
    (signed / "report.html").write_text("changed")
    assert verify(signed / "report.json").checked == ("report.json",)
    assert verify(signed / "report.json").valid
    assert not verify(signed / "report.html").valid
    assert not verify(signed / "report.sig.json").valid
    assert not verify(signed).valid
    (signed / "other.txt").write_text("x")
    assert "not among the signed files" in verify(signed / "other.txt").sentence()


@pytest.mark.parametrize("key", ["", "zz" * 32, "00" * 31, b"short", 32, b""])
def test_what_is_no_public_key_is_refused(signed: Path, key: object) -> None:
    with pytest.raises(ValueError, match="public_key must be 32 bytes or 64 hexadecimal digits"):
        verify(signed, key)


def forged(signed: Path, key: SecretKey, **changes: object) -> None:
    """A signature file with other content, signed all the same."""
    content = json.loads((signed / "report.sig.json").read_bytes())
    del content["signature"]
    content |= {"public_key": signing.public_key(key).hex(), **changes}
    content["signature"] = signing.sign(canonical.encode(content), key).hex()
    (signed / "report.sig.json").write_bytes(canonical.encode(content))


ENTRY = {"name": "report.json", "size": 1, "sha256": ""}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": 3},
        {"files": [ENTRY | {"name": "/etc/passwd"}, ENTRY]},
        {"files": [ENTRY, ENTRY]},
        {"files": [{"name": "report.html"}, {"name": "report.json"}]},
        {"files": [ENTRY | {"size": -1}, ENTRY | {"name": "report.html"}]},
        {"files": [ENTRY | {"size": True}, ENTRY | {"name": "report.html"}]},
        {"files": [ENTRY | {"sha256": 5}, ENTRY | {"name": "report.html"}]},
        {"files": [ENTRY | {"name": ["report.html"]}, "report.json"]},
        {"key_id": 7},
        {"schema": "assay.signature/2"},
        {"algorithm": "none"},
        {"public_key": 5},
        {"public_key": "00"},
        {"extra": 1},
    ],
)
def test_signature_files_for_something_else_are_refused(signed: Path, make_signer: Callable, changes: dict) -> None:
    forged(signed, make_signer(1), **changes)
    finding = verify(signed)
    assert not finding.valid
    assert finding.problems[0].startswith("report.sig.json:")


def test_an_absurd_size_is_not_read(signed: Path, make_signer: Callable) -> None:
    forged(signed, make_signer(1), files=[ENTRY | {"size": 10**18}, ENTRY | {"name": "report.html"}])
    assert "signed were 1000000000000000000" in verify(signed).sentence()


@pytest.mark.parametrize("data", [b"null", b"[]", b"{}", b"[" * 60_000, b"\xff", b"9" * 60_000, b"x" * 10**6])
def test_garbage_in_place_of_a_signature_is_refused(signed: Path, data: bytes) -> None:
    (signed / "report.sig.json").write_bytes(data)
    assert verify(signed).problems[0].startswith("report.sig.json: damaged or changed")


def test_saving_again_without_a_key_removes_the_old_signature(signed: Path, small_report: Report) -> None:
    small_report.save(signed)
    assert sorted(os.listdir(signed)) == ["report.html", "report.json"]
    assert "the report is not signed" in verify(signed).sentence()


def test_a_crash_while_saving_leaves_no_signature_over_other_files(
    signed: Path, full_report: Report, make_signer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assay.detection.corpus import ledger

    real = ledger.write_atomically
    for last in range(3):
        written: list[str] = []

        def stops(path: Path, data: bytes, *, written: list[str] = written, last: int = last) -> None:
            if len(written) == last:
                raise OSError("disk full")
            written.append(path.name)
            real(path, data)

        monkeypatch.setattr(ledger, "write_atomically", stops)
        with pytest.raises(OSError, match="disk full"):
            full_report.save(signed, sign_with=make_signer(1))
        assert not verify(signed)
        assert set(os.listdir(signed)) <= {"report.html", "report.json"}
    monkeypatch.setattr(ledger, "write_atomically", real)
    full_report.save(signed, sign_with=make_signer(1))
    assert verify(signed)


def test_keys_that_may_not_sign_write_nothing(
    small_report: Report, make_signer: Callable, make_key: Callable, tmp_path: Path
) -> None:
    retired = make_signer(1).with_state("retired", datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(RevokedKeyError):
        small_report.save(tmp_path / "out", sign_with=retired)
    with pytest.raises(ValueError, match="a watermark key never signs"):
        small_report.save(tmp_path / "out", sign_with=make_key())
    assert not (tmp_path / "out").exists()


def test_saved_files_are_what_the_report_gives_and_the_signature_names_no_secret(
    signed: Path, small_report: Report, make_signer: Callable
) -> None:
    assert (signed / "report.json").read_bytes() == small_report.to_json()
    assert (signed / "report.html").read_text(encoding="utf-8") == small_report.to_html()
    text = (signed / "report.sig.json").read_text()
    assert make_signer(1)._secret.hex() not in text
    assert set(json.loads(text)) == signature._FIELDS


def test_signature_checks_with_another_library_from_the_documented_rule(signed: Path) -> None:
    # The recipe of docs/explanation/report.md: sort keys, no spaces, UTF-8, all fields but the signature.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    content = json.loads((signed / "report.sig.json").read_text())
    given = bytes.fromhex(content.pop("signature"))
    message = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["public_key"])).verify(given, message)
