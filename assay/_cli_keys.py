"""`assay keys`: make, list, rotate and revoke keys, and export what is public about them.

Results go to stdout, as JSON when it is not a terminal or with --json; everything else goes to stderr.
Exit codes: 0 done, 1 refused (unknown key, wrong passphrase, damaged file), 2 usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assay._errors import AssayError, KeyringError

if TYPE_CHECKING:
    from assay.watermark.keyring import Keyring
    from assay.watermark.keys import KeyInfo
    from assay.watermark.schemes import SchemeConfig

keys_app = typer.Typer(
    help="Make, list, rotate and revoke keys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # local variables of this module may be passphrases
)

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
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, also to a terminal.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="Id of the key.")]

DEFAULT_KEYRING = Path("~/.config/assay/keyring.json")

_MAX_PASSPHRASE_BYTES = 4096


@keys_app.command("new")
def new(
    *,
    keyring: KeyringPath = DEFAULT_KEYRING,
    id: Annotated[str | None, typer.Option("--id", help="Id of the key; default k- and 12 random digits.")] = None,
    scheme: Annotated[str, typer.Option(help='"gumbel" for a watermark, "ed25519" for signing reports.')] = "gumbel",
    window: Annotated[
        int | None, typer.Option(help="Context width of a watermark, in tokens; default 4.", show_default=False)
    ] = None,
    development: Annotated[
        bool, typer.Option("--development", help="If the keyring is missing, make one that is NOT encrypted.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key; the keyring is made too if it is missing."""
    from assay.watermark.keys import SecretKey

    with _refusals():
        key = SecretKey.generate(id, _config(scheme, window))
        _open_or_create(keyring, passphrase_file, development=development).add(key)
        _show_key(key.info, f"made key {key.id!r}", as_json=as_json)


@keys_app.command("list")
def list_keys(*, keyring: KeyringPath = DEFAULT_KEYRING, as_json: AsJson = False) -> None:
    """List the keys. Needs no passphrase, and therefore cannot notice a forged file: every other command does."""
    from assay.watermark.keyring import is_encrypted, read_public

    with _refusals():
        infos = read_public(keyring)
        encrypted = is_encrypted(keyring)
        if not encrypted:
            _say(f"keyring {keyring} is not encrypted: development only.")
        if _wants_json(as_json):
            content = {"keyring": str(keyring), "encrypted": encrypted, "keys": [info.to_dict() for info in infos]}
            _write_json(content)
        else:
            Console(highlight=False).print(_table(infos))


@keys_app.command("rotate")
def rotate(
    id: KeyId,
    *,
    keyring: KeyringPath = DEFAULT_KEYRING,
    new_id: Annotated[str | None, typer.Option("--new-id", help="Id of the new key; default random.")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Retire a key and make its successor with the same settings; the old one still detects."""
    with _refusals():
        key = open_keyring(keyring, passphrase_file).rotate(id, new_id)
        _show_key(key.info, f"retired key {id!r}, made key {key.id!r}", as_json=as_json)


@keys_app.command("revoke")
def revoke(
    id: KeyId,
    *,
    keyring: KeyringPath = DEFAULT_KEYRING,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key whose secret others may know: it neither embeds, signs nor detects any more. Cannot be undone."""
    with _refusals():
        opened = open_keyring(keyring, passphrase_file)
        info = opened[id].info
        if not yes:
            _confirm(f"Revoke key {id!r} ({info.config.tag}, {info.state})? This cannot be undone.")
        opened.revoke(id)
        _show_key(opened[id].info, f"revoked key {id!r}", as_json=as_json)


@keys_app.command("export-public")
def export_public(
    *,
    keyring: KeyringPath = DEFAULT_KEYRING,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write here; default stdout.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Write what others may know: ids, settings, states, fingerprints, and the public keys that verify reports."""
    with _refusals():
        public = open_keyring(keyring, passphrase_file).export_public()
        if out is None:
            _write_json(public)
        else:
            out.write_text(_json(public), encoding="utf-8")
            _say(f"wrote {out}")


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
    with _warnings_on_stderr():
        return Keyring.open(path, passphrase=_passphrase(passphrase_file) if encrypted else None)


def _open_or_create(path: Path, passphrase_file: Path | None, *, development: bool) -> Keyring:
    from assay.watermark.keyring import Keyring

    if path.expanduser().exists():
        opened = open_keyring(path, passphrase_file)
        if development and opened.protection != "none: development only":
            raise KeyringError(f"--development is for a new keyring, {path} exists and is encrypted. Leave it out.")
        return opened
    with _warnings_on_stderr():
        if development:
            return Keyring.create(path, development=True)
        created = Keyring.create(path, passphrase=_passphrase(passphrase_file, confirm=True))
    _say(f"made keyring {created.path}")
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


def _config(scheme: str, window: int | None) -> SchemeConfig:
    from assay.watermark.schemes import config_from, newest

    parameters: dict[str, Any] = {} if window is None else {"window": window}
    return config_from(scheme, newest(scheme).version, parameters)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn Assay's errors into one line on stderr and an exit code."""
    try:
        yield
    except (AssayError, OSError) as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        _say(f"warning: {warning.message}")


def _confirm(question: str) -> None:
    # Not typer.confirm, which writes a space to stdout, where only results belong.
    _say(f"{question} [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        _say("nothing was changed")
        raise typer.Exit(1)


def _say(message: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message)


def _wants_json(as_json: bool) -> bool:
    return as_json or not sys.stdout.isatty()


def _json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write_json(content: object) -> None:
    sys.stdout.write(_json(content))


def _show_key(info: KeyInfo, done: str, *, as_json: bool) -> None:
    _say(done)
    if _wants_json(as_json):
        _write_json(info.to_dict())
    else:
        Console(highlight=False).print(_table((info,)))


def _table(infos: tuple[KeyInfo, ...]) -> Table:
    table = Table("id", "scheme", "settings", "state", "since (UTC)", "fingerprint")
    for info in infos:
        since = info.revoked or info.retired or info.created
        settings = ", ".join(f"{name}={value}" for name, value in info.config.parameters().items())
        table.add_row(
            info.id, info.config.tag, settings, info.state, f"{since:%Y-%m-%d %H:%M}", f"{info.fingerprint[:16]}..."
        )
    return table
