"""`assay report` and `assay verify`: make a report from a corpus run, check a report.

`report` writes the path of the page to stdout; `verify` its finding. Everything else goes to stderr. Exit codes:
0 done or valid, 1 refused or not valid, 2 usage.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._cli_keys import DEFAULT_KEYRING, KeyringPath, PassphraseFile, open_keyring
from assay._errors import AssayError

if TYPE_CHECKING:
    from assay.report import Verification
    from assay.watermark.keyring import Keyring


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder that `assay detect --out` wrote.")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the report.")],
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Watermark audit",
    fdr: Annotated[
        float | None, typer.Option(help="False discovery rate; default the run's.", show_default=False)
    ] = None,
    excerpts: Annotated[
        int, typer.Option(min=0, help="Flagged documents to show with their text; needs --keyring. 0 shows none.")
    ] = 10,
    tokenizer: Annotated[
        str | None, typer.Option(help="The run's tokenizer, if it is not found where it was.", show_default=False)
    ] = None,
    sign_with: Annotated[
        str | None,
        typer.Option("--sign-with", metavar="KEY_ID", help="Signing key of the keyring.", show_default=False),
    ] = None,
    keyring: KeyringPath = DEFAULT_KEYRING,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make the audit report of a corpus run: report.html, report.json and, with --sign-with, report.sig.json."""
    from assay.report import Report

    try:
        opened = _keyring(keyring, passphrase_file, needed=sign_with is not None)
        signer = None if sign_with is None or opened is None else opened[sign_with]
        if opened is None and excerpts:
            _say(f"no keyring at {keyring}: the report shows no excerpts, because their tokens cannot be scored.")
        made = Report.from_run(
            run_dir,
            fdr=fdr,
            keys=opened if excerpts else None,
            tokenizer=tokenizer,
            excerpts=excerpts,
            title=title,
        )
        page = made.save(out, sign_with=signer)
    except (AssayError, OSError) as error:
        _refuse(error)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _say(made.verdict)
    if signer is None:
        _say("the report is not signed: give --sign-with a key of scheme ed25519.")
    typer.echo(str(page))


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the report, or one of its files.")],
    *,
    public_key: Annotated[
        str | None,
        typer.Option(
            "--public-key",
            metavar="HEX|FILE",
            help="The signer's public key, known from elsewhere: 64 hexadecimal digits, a file that holds them, or a "
            "file from `assay keys export-public`.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Check that a report is, byte for byte, what its signer signed."""
    from assay.report import verify as check

    try:
        candidates = [None] if public_key is None else _public_keys(public_key)
        findings = [check(path, candidate) for candidate in candidates]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    finding = next((one for one in findings if one.signer_checked), findings[0])
    typer.echo(json.dumps(asdict(finding)) if as_json else _words(finding))
    raise typer.Exit(0 if finding.valid else 1)


def _words(finding: Verification) -> str:
    if finding.valid:
        return finding.sentence()
    return "\n".join(["INVALID", *finding.problems])


def _keyring(path: Path, passphrase_file: Path | None, *, needed: bool) -> Keyring | None:
    """The keyring, or None where there is none and nothing needs it."""
    if not needed and not path.expanduser().exists():
        return None
    return open_keyring(path, passphrase_file)


def _public_keys(given: str) -> list[str]:
    """The public keys that an argument names: hexadecimal digits, a file of them, or an export of a keyring."""
    if len(given) == 64 and all(digit in "0123456789abcdefABCDEF" for digit in given):
        return [given]
    text = Path(given).read_text(encoding="utf-8").strip()
    if not text.startswith("{"):
        return [text]
    keys: list[Any] = json.loads(text).get("keys", [])
    found = [str(key["public_key"]) for key in keys if isinstance(key, dict) and "public_key" in key]
    if not found:
        raise ValueError(f"--public-key: {given} names no signing key.")
    return found


def _refuse(error: Exception) -> None:
    _say(f"error: {error}")
    raise typer.Exit(1)


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
