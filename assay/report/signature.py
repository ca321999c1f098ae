"""Saving, signing and verifying a report: Ed25519 over the canonical JSON of the files' hashes.

report.sig.json is canonical JSON itself, so every byte of it is fixed by its content: schema, algorithm, key id, public
key and, for each file, name, size and SHA-256; the signature covers all of these. Reference: RFC 8032, section 5.1.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.report import canonical

if TYPE_CHECKING:
    from assay.watermark.keys import SecretKey

SCHEMA = "assay.signature/1"
ALGORITHM = "Ed25519"
REPORT_JSON, REPORT_HTML, SIGNATURE_JSON = "report.json", "report.html", "report.sig.json"
_FIELDS = {"schema", "algorithm", "key_id", "public_key", "files", "signature"}
# A signature file has a few hundred bytes; a larger one is not read, whoever made it.
_MOST_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a check of a report found.

    Attributes
    ----------
    valid
        Every checked file is byte for byte what was signed, and the signer is the expected one where a public key was
        given.
    signer_checked
        A public key was given and is the one that signed. Without it `valid` proves integrity, not who signed.
    key_id
        The signing key's id as the signer wrote it; None where the signature could not be read.
    public_key
        The signing public key, 64 hexadecimal digits; None likewise.
    checked
        Names of the files whose bytes were compared.
    problems
        What is wrong, one sentence each, beginning with the file's name; empty if valid.
    """

    valid: bool
    signer_checked: bool
    key_id: str | None
    public_key: str | None
    checked: tuple[str, ...]
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.valid

    def sentence(self) -> str:
        """The finding in words."""
        if not self.valid:
            return "INVALID. " + " ".join(self.problems)
        files = " and ".join(self.checked)
        if self.signer_checked:
            return f"VALID. {files}: unchanged since signed by the expected key, {self.key_id!r} ({self.public_key})."
        return (
            f"VALID, SIGNER NOT CHECKED. {files}: unchanged since signed with public key {self.public_key}, which says "
            f"it is {self.key_id!r}. This proves integrity, not who signed: anyone can sign with a key of their own. "
            "Get the signer's public key by another way and verify again with it."
        )


def save(contents: dict[str, bytes], directory: Path, *, sign_with: SecretKey | None) -> None:
    """Write a report's files and their signature; see `Report.save`."""
    from assay.detection.corpus.ledger import write_atomically

    signature = None if sign_with is None else signature_file(contents, sign_with)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SIGNATURE_JSON).unlink(missing_ok=True)
    for name, data in contents.items():
        write_atomically(directory / name, data)
    if signature is not None:
        write_atomically(directory / SIGNATURE_JSON, signature)


def signature_file(contents: dict[str, bytes], key: SecretKey) -> bytes:
    """The bytes of report.sig.json for these files."""
    from assay.watermark import signing

    statement = {
        "schema": SCHEMA,
        "algorithm": ALGORITHM,
        "key_id": key.id,
        "public_key": signing.public_key(key).hex(),
        "files": [
            {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in sorted(contents.items())
        ],
    }
    signature = signing.sign(canonical.encode(statement), key)
    return canonical.encode({**statement, "signature": signature.hex()})


def verify(path: str | Path, public_key: bytes | str | None = None) -> Verification:
    """Check a saved report against its signature; any changed byte in any of its files is found.

    Parameters
    ----------
    path
        The folder of the report: all its files are checked. Or one of its files: that file and the signature beside
        it are checked.
    public_key
        The expected signer's public key: 32 bytes or 64 hexadecimal digits, known from elsewhere. Without it the check
        proves integrity only.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    ValueError
        If `public_key` is not a public key.
    """
    expected = None if public_key is None else _public_key_hex(public_key)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path must be a report's folder or one of its files; nothing is at {str(path)!r}.")
    directory = path if path.is_dir() else path.parent
    wanted = None if path.is_dir() or path.name == SIGNATURE_JSON else path.name
    try:
        statement = _read_signature(directory / SIGNATURE_JSON)
    except ValueError as error:
        return Verification(
            valid=False, signer_checked=False, key_id=None, public_key=None, checked=(), problems=(str(error),)
        )
    signer = statement["public_key"]
    problems = []
    if expected is not None and signer != expected:
        problems.append(f"{SIGNATURE_JSON}: signed with public key {signer}, not with the expected {expected}.")
    signed = {entry["name"]: entry for entry in statement["files"]}
    if wanted is not None and wanted not in signed:
        problems.append(f"{wanted}: not among the signed files {sorted(signed)}.")
    checked = [name for name in signed if wanted in (None, name)]
    for name in checked:
        problem = _file_problem(directory / name, signed[name])
        if problem:
            problems.append(problem)
    return Verification(
        valid=not problems,
        signer_checked=expected is not None and signer == expected,
        key_id=statement["key_id"],
        public_key=signer,
        checked=tuple(checked),
        problems=tuple(problems),
    )


def _read_signature(path: Path) -> dict[str, Any]:
    """The content of a signature file whose own signature holds; ValueError says what is wrong with it."""
    from assay.watermark import signing

    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{SIGNATURE_JSON}: missing; the report is not signed.") from None
    except OSError as error:
        raise ValueError(f"{SIGNATURE_JSON}: cannot be read ({error.strerror}).") from error
    broken = f"{SIGNATURE_JSON}: damaged or changed"
    try:
        content = canonical.decode(data)
        # Equal content in another layout is refused too: then no byte of the file can be changed unnoticed.
        if not isinstance(content, dict) or content.keys() != _FIELDS or canonical.encode(content) != data:
            raise ValueError("not a canonical signature file")
        if content["schema"] != SCHEMA or content["algorithm"] != ALGORITHM:
            raise ValueError("unknown schema or algorithm")
        statement = {name: value for name, value in content.items() if name != "signature"}
        key, signature = bytes.fromhex(content["public_key"]), bytes.fromhex(content["signature"])
        if key.hex() != content["public_key"] or signature.hex() != content["signature"]:
            raise ValueError("hexadecimal digits must be lower case")
        if not signing.verify(canonical.encode(statement), signature, key):
            raise ValueError("the signature does not fit the content")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{broken} ({error}).") from error
    _check_statement(statement)
    return statement


def _check_statement(statement: dict[str, Any]) -> None:
    """Refuse a well-signed statement about other files than a report's: its names must not lead elsewhere."""
    entries = statement["files"] if isinstance(statement["files"], list) else []
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if sorted(map(str, names)) != sorted((REPORT_JSON, REPORT_HTML)) or not isinstance(statement["key_id"], str):
        raise ValueError(f"{SIGNATURE_JSON}: signed, but not for {REPORT_JSON} and {REPORT_HTML}.")
    for entry in entries:
        if not isinstance(entry.get("sha256"), str) or type(entry.get("size")) is not int or entry["size"] < 0:
            raise ValueError(f"{SIGNATURE_JSON}: signed, but without the hashes of the files.")


def _file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.exists():
        return f"{path.name}: missing."
    if not path.is_file():
        return f"{path.name}: not a file."
    try:
        with path.open("rb") as file:
            # A file of another size is not read, however large it is.
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size == entry["size"] else None
    except OSError as error:
        return f"{path.name}: cannot be read ({error.strerror})."
    if digest is None:
        return f"{path.name}: changed since it was signed (it has {size} bytes, signed were {entry['size']})."
    if digest != entry["sha256"]:
        return f"{path.name}: changed since it was signed (SHA-256 is {digest}, signed was {entry['sha256']})."
    return None


def _public_key_hex(public_key: bytes | str) -> str:
    try:
        raw = bytes.fromhex(public_key.strip()) if isinstance(public_key, str) else public_key
    except ValueError:
        raw = b""
    if not isinstance(raw, bytes) or len(raw) != 32:
        raise ValueError(
            "public_key must be 32 bytes or 64 hexadecimal digits, got something else. "
            "The signer's `assay keys export-public` shows it."
        )
    return raw.hex()
