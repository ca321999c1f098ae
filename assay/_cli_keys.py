"""`assay keys`: make, import, list, rotate and revoke keys, and export what is public about them.

Results go to stdout, as JSON when it is not a terminal or with --json; everything else goes to stderr.
Exit codes: 0 done, 1 refused (unknown key, wrong passphrase, damaged file), 2 usage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from assay._cli_keyring import DEFAULT_KEYRING, KeyringPath, PassphraseFile, open_keyring, open_or_create
from assay._cli_output import AsJson, as_json_text, refusals, say, wants_json, write_json

if TYPE_CHECKING:
    from assay.watermark.keys import KeyInfo
    from assay.watermark.schemes import SchemeConfig

keys_app = typer.Typer(
    help="Make, import, list, rotate and revoke keys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # local variables of this module may be passphrases
)

_MAX_SECRET_BYTES = 65536

KeyId = Annotated[str, typer.Argument(metavar="ID", help="Id of the key.")]


@keys_app.command("new")
def new(
    *,
    keyring: KeyringPath = DEFAULT_KEYRING,
    id: Annotated[str | None, typer.Option("--id", help="Id of the key; default k- and 12 random digits.")] = None,
    scheme: Annotated[
        str, typer.Option(help='"gumbel" or another watermark scheme, "ed25519" for signing reports.')
    ] = "gumbel",
    window: Annotated[
        int | None, typer.Option(help="Context width of a watermark, in tokens; default 4.", show_default=False)
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the scheme, such as delta=2; repeat it."),
    ] = None,
    development: Annotated[
        bool, typer.Option("--development", help="If the keyring is missing, make one that is NOT encrypted.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key; the keyring is made too if it is missing."""
    from assay.watermark.keys import SecretKey

    with refusals():
        key = SecretKey.generate(id, _config(scheme, window, setting or []))
        open_or_create(keyring, passphrase_file, development=development).add(key)
        _show_key(key.info, f"made key {key.id!r}", as_json=as_json)


@keys_app.command("import")
def import_key(
    *,
    scheme: Annotated[str, typer.Option(help='The other system\'s scheme, such as "hf-kgw" or "vllm-gumbel".')],
    keyring: KeyringPath = DEFAULT_KEYRING,
    id: Annotated[str | None, typer.Option("--id", help="Id of the key; default k- and 12 random digits.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A setting of the scheme, such as vocab_size=50257; repeat it."
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            "--secret-file",
            metavar="PATH",
            help="File that holds the key's integers, between commas or white space; else they are asked for on the "
            "terminal.",
        ),
    ] = None,
    development: Annotated[
        bool, typer.Option("--development", help="If the keyring is missing, make one that is NOT encrypted.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Add the key of another system, whose texts are then read and written alike; the keyring is made if missing."""
    from assay.watermark.foreign import ForeignConfig, parse
    from assay.watermark.keys import SecretKey

    with refusals():
        config = _config(scheme, None, setting or [])
        if not isinstance(config, ForeignConfig):
            raise typer.BadParameter(f"--scheme must be another system's scheme, got {scheme!r}. Use `assay keys new`.")
        integers = parse(config, _secret_text(secret_file))
        if isinstance(integers, str):
            raise ValueError(integers)
        key = SecretKey.from_integers(config, integers, id=id)
        open_or_create(keyring, passphrase_file, development=development).add(key)
        _show_key(key.info, f"imported key {key.id!r}", as_json=as_json)


@keys_app.command("list")
def list_keys(*, keyring: KeyringPath = DEFAULT_KEYRING, as_json: AsJson = False) -> None:
    """List the keys. Needs no passphrase, and therefore cannot notice a forged file: every other command does."""
    from assay.watermark.keyring import is_encrypted, read_public

    with refusals():
        infos = read_public(keyring)
        encrypted = is_encrypted(keyring)
        if not encrypted:
            say(f"keyring {keyring} is not encrypted: development only.")
        if wants_json(as_json):
            content = {"keyring": str(keyring), "encrypted": encrypted, "keys": [info.to_dict() for info in infos]}
            write_json(content)
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
    with refusals():
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
    with refusals():
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
    with refusals():
        public = open_keyring(keyring, passphrase_file).export_public()
        if out is None:
            write_json(public)
        else:
            out.write_text(as_json_text(public), encoding="utf-8")
            say(f"wrote {out}")


def _config(scheme: str, window: int | None, settings: list[str]) -> SchemeConfig:
    from assay.watermark.schemes import config_from, newest

    parameters: dict[str, Any] = {} if window is None else {"window": window}
    for setting in settings:
        name, found, value = setting.partition("=")
        if not found or not name or name in parameters:
            raise typer.BadParameter(f"--set must be NAME=VALUE, each name once, got {setting!r}.")
        parameters[name] = _value(value)
    return config_from(scheme, newest(scheme).version, parameters)


def _secret_text(file: Path | None) -> str:
    """The integers as written, from a file or the terminal; never from the command line, which others can read."""
    if file is not None:
        try:
            with file.open("rb") as stream:
                data = stream.read(_MAX_SECRET_BYTES + 1)
        except OSError as error:
            raise typer.BadParameter(f"--secret-file {file} cannot be read: {error.strerror}.") from None
        if len(data) > _MAX_SECRET_BYTES:
            raise typer.BadParameter(f"--secret-file {file} must have at most {_MAX_SECRET_BYTES} bytes.")
        return data.decode("ascii", "replace")
    if not sys.stdin.isatty():
        raise typer.BadParameter("give --secret-file: there is no terminal to ask on.")
    answer: str = typer.prompt("Key", hide_input=True, err=True)
    return answer


def _value(text: str) -> Any:
    """A number, true, false or None where the text is one, else the text."""
    if text == "None":  # as the messages of the settings write it; JSON says null
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _confirm(question: str) -> None:
    # Not typer.confirm, which writes a space to stdout, where only results belong.
    say(f"{question} [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        say("nothing was changed")
        raise typer.Exit(1)


def _show_key(info: KeyInfo, done: str, *, as_json: bool) -> None:
    say(done)
    if wants_json(as_json):
        write_json(info.to_dict())
    else:
        Console(highlight=False).print(_table((info,)))


def _table(infos: tuple[KeyInfo, ...]) -> Table:
    # The id is what a reader needs: on a narrow terminal the other columns give way.
    id_column = Column("id", no_wrap=True, min_width=max((len(info.id) for info in infos), default=2))
    table = Table(id_column, "scheme", "settings", "state", "since (UTC)", "fingerprint")
    for info in infos:
        since = info.revoked or info.retired or info.created
        settings = ", ".join(f"{name}={value}" for name, value in info.config.parameters().items())
        table.add_row(
            info.id, info.config.tag, settings, info.state, f"{since:%Y-%m-%d %H:%M}", f"{info.fingerprint[:16]}..."
        )
    return table
