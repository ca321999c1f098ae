"""`assay report` and `assay verify`: make a report from a corpus run, check a report.

Results go to stdout, as JSON when it is not a terminal or with --json; everything else goes to stderr. Exit codes:
0 done or valid, 1 refused or not valid, 2 usage.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._cli_keyring import DEFAULT_KEYRING, KeyringPath, PassphraseFile, open_keyring
from assay._cli_output import AsJson, refusals, say, wants_json, write_json
from assay._errors import AssayError

if TYPE_CHECKING:
    from assay.report import Verification
    from assay.watermark.keyring import Keyring
    from assay.watermark.keys import SecretKey


def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", exists=True, file_okay=False, help="Folder from `assay detect --out`.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the report.")],
    title: Annotated[
        str | None,
        typer.Option(help="Heading; default what was tested for.", show_default=False),
    ] = None,
    fdr: Annotated[
        float | None, typer.Option(help="False discovery rate; default the run's.", show_default=False)
    ] = None,
    excerpts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Flagged documents to show with their text; needs the keyring. 0 shows none; a run against "
            '"a human wrote it" never shows any.',
        ),
    ] = 10,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="The run's tokenizer, if it is no longer where it was.")
    ] = None,
    sign_with: Annotated[
        str | None, typer.Option("--sign-with", metavar="ID", help="Id of a signing key in the keyring.")
    ] = None,
    private: Annotated[
        Path | None,
        typer.Option(
            "--private",
            metavar="LEDGER",
            help="Write what may be published instead: private.html and private.json, differentially "
            "private counts, paid for from this ledger; made on first use with --epsilon as its limit.",
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="With --private: what this publication costs.", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Put an unsigned report in the place of a signed one.")
    ] = False,
    keyring: KeyringPath = DEFAULT_KEYRING,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make the audit report of a corpus run: report.html, report.json and, with --sign-with, report.sig.json."""
    if (private is None) != (epsilon is None):
        raise typer.BadParameter("--private LEDGER and --epsilon go together.")
    if private is not None and epsilon is not None:
        with refusals():
            _publish(run_dir, out, private, epsilon, as_json=as_json)
        return
    from assay.detection.corpus import RunSummary
    from assay.report import Report

    with refusals():
        if sign_with is None and not force:
            _keep_signature(out)
        excerpts = excerpts if RunSummary.read(run_dir).keys else 0
        opened = _keyring(keyring, passphrase_file, excerpts=excerpts, sign_with=sign_with)
        signer = None if sign_with is None or opened is None else opened[sign_with]
        keys = None if opened is None or not excerpts else _all_keys(opened)
        made = Report.from_run(run_dir, fdr=fdr, keys=keys, tokenizer=tokenizer, excerpts=excerpts, title=title)
        page = made.save(out, sign_with=signer)
    if signer is None:
        say("the report is not signed; --sign-with takes a key of scheme ed25519.")
    if wants_json(as_json):
        write_json({"verdict": made.verdict, "page": str(page), "signed_with": sign_with})
    else:
        typer.echo(f"{made.verdict}\nReport: {page}")


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", exists=True, help="Folder of the report, or one of its files.")
    ],
    *,
    public_key: Annotated[
        str | None,
        typer.Option(
            "--public-key",
            metavar="HEX|FILE",
            help="The signer's public key, known from elsewhere: 64 hexadecimal digits, a file that holds them, or a "
            "file from `assay keys export-public`.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a report is, byte for byte, what its signer signed."""
    from assay.report import verify as check

    try:
        expected = [None] if public_key is None else _public_keys(public_key)
        findings = [check(path, one) for one in expected]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    finding = next((one for one in findings if one.signer_checked), findings[0])
    if wants_json(as_json):
        write_json(asdict(finding) | {"finding": finding.sentence()})
    else:
        typer.echo(_words(finding))
    raise typer.Exit(0 if finding.valid else 1)


def _keep_signature(out: Path) -> None:
    """Refuse to put an unsigned report in the place of a signed one: its signature would be gone."""
    from assay.report.signature import SIGNATURE_JSON

    if (out / SIGNATURE_JSON).exists():
        raise AssayError(
            f"{out} holds a signed report, whose signature an unsigned one would remove. Sign the new one with "
            "--sign-with, choose another --out, or give --force."
        )


def _publish(run_dir: Path, out: Path, ledger: Path, epsilon: float, *, as_json: bool) -> None:
    """Write the private statistics of a run."""
    from assay.privacy import Budget, Ledger
    from assay.report.private import publish_run

    if ledger.exists():
        opened = Ledger.open(ledger)
    else:
        opened = Ledger.create(ledger, Budget.pure(epsilon, adjacency="add-remove", unit="document"))
        say(f"made ledger {ledger}, limit epsilon = {epsilon:g}.")
    with opened:
        made = publish_run(run_dir, opened, epsilon=epsilon)
    made.save(out)
    if wants_json(as_json):
        write_json(made.to_dict())
    else:
        spent = f"{made.epsilon_spent:g} of {made.epsilon_limit:g} spent ({made.accountant})"
        typer.echo(f"Published at epsilon = {made.epsilon:g}; {spent}.\nPage: {out / 'private.html'}")


def _words(finding: Verification) -> str:
    return finding.sentence() if finding.valid else "\n".join(["INVALID", *finding.problems])


def _keyring(path: Path, passphrase_file: Path | None, *, excerpts: int, sign_with: str | None) -> Keyring | None:
    """The keyring, or None where nothing needs it, or where only excerpts would and there is none."""
    if sign_with is None and not excerpts:
        return None
    if sign_with is None and not path.expanduser().exists():
        say(f"there is no keyring {path}, so the report shows no excerpts: their tokens cannot be scored.")
        return None
    return open_keyring(path, passphrase_file)


def _all_keys(keyring: Keyring) -> list[SecretKey]:
    """Watermark keys in every state: the run may have been told to test a revoked one."""
    return [keyring[info.id] for info in keyring if info.config.purpose == "watermark"]


def _public_keys(given: str) -> list[str]:
    """The public keys that an argument names: hexadecimal digits, a file of them, or an export of a keyring."""
    if len(given) == 64 and all(digit in "0123456789abcdefABCDEF" for digit in given):
        return [given]
    try:
        text = Path(given).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(
            f"--public-key must be 64 hexadecimal digits or a file, got {given!r} ({error.strerror})."
        ) from error
    if not text.startswith("{"):
        return [text]
    entries: Any = json.loads(text).get("keys")
    found = [entry["public_key"] for entry in entries or () if isinstance(entry, dict) and "public_key" in entry]
    if not found:
        raise ValueError(f"--public-key: {given} names no signing key.")
    return found
