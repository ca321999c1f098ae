"""`assay serve` and `assay api-keys`: the HTTP service with its job workers, and who may call it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from assay._cli_output import AsJson, refusals, say, wants_json, write_json

if TYPE_CHECKING:
    from assay.service.settings import Settings
    from assay.service.state import State

Data = Annotated[
    Path,
    typer.Option("--data", metavar="FOLDER", help="Database, uploads and runs; made if missing.", envvar="ASSAY_DATA"),
]
Database = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="postgresql+psycopg://...; default SQLite in the folder.", envvar="ASSAY_DATABASE_URL"
    ),
]

api_keys_app = typer.Typer(
    help="Make and revoke the API keys of a service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # local variables of this module may be secrets
)


def serve(
    *,
    data: Data = Path("assay-data"),
    database_url: Database = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    processes: Annotated[int, typer.Option(min=1, help="Server processes.")] = 1,
    job_workers: Annotated[
        int, typer.Option(min=0, help="Processes that work on jobs.", envvar="ASSAY_JOB_WORKERS")
    ] = 1,
    model: Annotated[
        str,
        typer.Option(metavar="PATH", help='Model of completions; "default" is the bundled one.', envvar="ASSAY_MODEL"),
    ] = "default",
) -> None:
    """Serve keys, detection, jobs and completions over HTTP; end with SIGTERM or Ctrl-C."""
    _write_for_oneself()
    with refusals():
        _needs_service()
        from assay.service.server import listen, run
        from assay.service.settings import Settings
        from assay.service.state import open_state
        from assay.service.supervise import Command, Processes

        settings = Settings.from_environment(
            data=data.absolute(), database_url=database_url, model=model, job_workers=job_workers
        )
        listener = listen(host, port)
        environment = _environment(settings)
        os.environ.update(environment)
        # Opened once before any process starts: migrations run, the master key is made, mistakes show here.
        state = open_state(settings)
        _first_key(state, settings.data)
        state.engine.dispose()
    say(f"listening at {host} port {listener.getsockname()[1]}; end with Ctrl-C.")
    # uvicorn ends in good order and then sends itself the signal again; without a handler, the workers would be left.
    signal.signal(signal.SIGTERM, _end)
    workers = [Command("assay.service.worker")] * job_workers
    if processes == 1:
        os.environ.update(environment)  # again: the master key was removed when it was read
        with Processes(workers, environment):
            run(listener)
        return
    servers = [Command("assay.service.server", (listener.fileno(),))] * processes
    with Processes([*servers, *workers], environment), listener, contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()


@api_keys_app.callback()
def _write_for_oneself() -> None:
    # Whatever is written, by worker processes too, is its owner's alone, also in a folder that was open to others.
    os.umask(0o077)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


@api_keys_app.command("new")
def new(
    tenant: Annotated[str, typer.Argument(help="Who it is for; made if new.")],
    *,
    scope: Annotated[list[str], typer.Option(help="detect, embed, keys or admin; repeat it.")],
    name: Annotated[str, typer.Option(help="For people.")] = "",
    data: Data = Path("assay-data"),
    database_url: Database = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key; it is shown this once."""
    with refusals():
        _needs_service()
        from assay.service.auth import create_api_key
        from assay.service.settings import Settings
        from assay.service.state import open_database

        _, sessions = open_database(Settings.from_environment(data=data, database_url=database_url))
        id, token = create_api_key(sessions, tenant, scope, name=name)
    if wants_json(as_json):
        write_json({"id": id, "tenant": tenant, "scopes": sorted(set(scope)), "token": token})
    else:
        typer.echo(token)


@api_keys_app.command("revoke")
def revoke(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    id: Annotated[str, typer.Argument(metavar="ID", help="The part between the underscores.")],
    *,
    data: Data = Path("assay-data"),
    database_url: Database = None,
) -> None:
    """Revoke an API key; running servers notice within five seconds."""
    with refusals():
        _needs_service()
        from assay._errors import UnknownKeyError
        from assay.service.auth import revoke_api_key
        from assay.service.settings import Settings
        from assay.service.state import open_database

        _, sessions = open_database(Settings.from_environment(data=data, database_url=database_url))
        if not revoke_api_key(sessions, tenant, id):
            raise UnknownKeyError(f"tenant {tenant!r} has no API key {id!r}.")
    say(f"revoked API key {id!r}")


def _environment(settings: Settings) -> dict[str, str]:
    """The environment of server and worker processes: this one's, and the settings."""
    from dataclasses import fields

    # One text is one thread's work: the tokenizer's own threads would fight over the cores with other requests.
    out = dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    for one in fields(settings):
        value = getattr(settings, one.name)
        if value is not None:
            out[f"ASSAY_{one.name.upper()}"] = str(value)
    return out


def _first_key(state: State, data: Path) -> None:
    """On the very first start: an API key for everything, in a file that its owner alone can read."""
    from sqlalchemy import func, select

    from assay.service.auth import create_api_key
    from assay.service.database import ApiKey

    with state.sessions() as session:
        if session.scalar(select(func.count()).select_from(ApiKey)):
            return
    path = data / "first-api-key"
    _, token = create_api_key(state.sessions, "default", ["admin"], name="made at the first start")
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(token + "\n")
    say(f"an API key for everything is in {path}; move it to a safe place.")


def _needs_service() -> None:
    from importlib.util import find_spec

    from assay._errors import MissingDependencyError

    missing = [name for name in ("fastapi", "uvicorn", "sqlalchemy", "alembic") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"the service needs {', '.join(missing)}: pip install 'assay[service]'.")
