"""Opening the keyring for a command: where it is, and where its passphrase comes from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay._cli_output import say, warnings_on_stderr
from assay._errors import KeyringError

if TYPE_CHECKING:
    from assay.watermark.keyring import Keyring

KeyringPath = Annotated[
    Path,
    typer.Option("--keyring", metavar="PATH", envvar="ASSAY_KEYRING", help="The keyring file.", dir_okay=False),
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="PATH",
        help="File that holds the passphrase; else it is taken from ASSAY_PASSPHRASE or asked for on the terminal.",
    ),
]

DEFAULT_KEYRING = Path("~/.config/assay/keyring.json")

_MAX_PASSPHRASE_BYTES = 4096


def open_keyring(path: Path, passphrase_file: Path | None = None) -> Keyring:
    """Open a keyring for a command; warnings go to stderr.

    Parameters
    ----------
    path
        The keyring file.
    passphrase_file
        See `PassphraseFile`. Not read for a development keyring.

    Raises
    ------
    KeyringError
        As `Keyring.open`.
    typer.BadParameter
        If no passphrase can be had.
    """
    from assay.watermark.keyring import Keyring, is_encrypted

    encrypted = is_encrypted(path)
    with warnings_on_stderr():
        return Keyring.open(path, passphrase=_passphrase(passphrase_file) if encrypted else None)


def open_or_create(path: Path, passphrase_file: Path | None, *, development: bool) -> Keyring:
    """As `open_keyring`; a missing keyring is made, encrypted unless `development`."""
    from assay.watermark.keyring import Keyring

    if path.expanduser().exists():
        opened = open_keyring(path, passphrase_file)
        if development and opened.protection != "none: development only":
            raise KeyringError(f"--development is for a new keyring, {path} exists and is encrypted. Leave it out.")
        return opened
    with warnings_on_stderr():
        if development:
            return Keyring.create(path, development=True)
        created = Keyring.create(path, passphrase=_passphrase(passphrase_file, confirm=True))
    say(f"made keyring {created.path}")
    return created


def _passphrase(file: Path | None, *, confirm: bool = False) -> str:
    if file is not None:
        return _passphrase_in(file)
    if "ASSAY_PASSPHRASE" in os.environ:
        return os.environ["ASSAY_PASSPHRASE"]
    if not sys.stdin.isatty():
        raise typer.BadParameter("give --passphrase-file or ASSAY_PASSPHRASE: there is no terminal to ask on.")
    answer: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


def _passphrase_in(file: Path) -> str:
    """The first line of the file, decoded as Python decodes the environment."""
    try:
        with file.open("rb") as stream:
            line = stream.readline(_MAX_PASSPHRASE_BYTES + 1)
    except OSError as error:
        raise typer.BadParameter(f"--passphrase-file {file} cannot be read: {error.strerror}.") from None
    if len(line) > _MAX_PASSPHRASE_BYTES:
        raise typer.BadParameter(f"--passphrase-file {file} has no line of at most {_MAX_PASSPHRASE_BYTES} bytes.")
    return line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
