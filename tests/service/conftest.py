"""The service over SQLite and over a PostgreSQL that the tests start themselves; callers of several tenants."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from serve_process import Server
from service_app import Service
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import sessionmaker

from assay.detection.text import LoadedTokenizer, load_tokenizer
from assay.service.app import create_app
from assay.service.database import open_engine, sessions
from assay.service.envelope import LocalMasterKey
from assay.service.migrate import upgrade
from assay.service.settings import Settings

MASTER = bytes(range(32))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server from the distribution's packages, for a database named {name}."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip("PostgreSQL is not installed: no /usr/lib/postgresql/*/bin/pg_ctl")
    folder = Path(tempfile.mkdtemp(prefix="assay-pg-"))  # short: the name of a socket has at most 107 bytes
    as_other: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = next(name for name in ("postgres", "nobody") if _is_user(name))
        shutil.chown(folder, user)
        as_other = ["runuser", "-u", user, "--"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*as_other, str(found[-1].parent / program), *arguments], cwd=folder, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()

    data, log = str(folder / "data"), str(folder / "log")
    run("initdb", "-D", data, "-U", "assay", "-A", "trust", "-E", "UTF8", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c max_connections=200 -c fsync=off"
    # Its log goes to a file: a server that held the pipe would keep pg_ctl's caller waiting.
    run("pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")
    try:
        yield f"postgresql+psycopg://assay@127.0.0.1:{port}/{{name}}"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    url: str = request.getfixturevalue("postgresql")
    name = f"t{uuid4().hex[:12]}"
    server = create_engine(url.format(name="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield url.format(name=name)
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A migrated database of each kind."""
    opened = open_engine(database_url)
    upgrade(opened)
    yield opened
    opened.dispose()


@pytest.fixture
def made_sessions(engine: Engine) -> sessionmaker[Any]:
    return sessions(engine)


@pytest.fixture
def local_sessions(tmp_path: Path) -> Iterator[sessionmaker[Any]]:
    """Of a migrated SQLite database, for what does not depend on the kind."""
    opened = open_engine(f"sqlite:///{tmp_path / 'local.db'}")
    upgrade(opened)
    yield sessions(opened)
    opened.dispose()


@pytest.fixture(scope="session")
def tokenizer() -> LoadedTokenizer:
    return load_tokenizer("default")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts services over SQLite, or over what `database_url` names; they end with the test."""
    opened: list[Service] = []

    def begin(**given: object) -> Service:
        data = given.pop("data", tmp_path / "data")
        settings = Settings(data=data, **given)  # type: ignore[arg-type]
        app = create_app(settings, master=LocalMasterKey(MASTER))
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        opened.append(Service(app, client, settings, app.state.assay.engine))
        return opened[-1]

    yield begin
    for service in opened:
        service.client.__exit__(None, None, None)


@pytest.fixture
def service(start: Callable[..., Service]) -> Service:
    """A service over SQLite with the default settings."""
    return start()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts `assay serve` over one data folder, as often as asked; all of it ends with the test."""
    started: list[Server] = []

    def begin(*options: str, port: int | None = None, **environment: str) -> Server:
        started.append(Server(tmp_path / "data", *options, port=port, environment=environment))
        return started[-1]

    yield begin
    for server in started:
        server.kill_all()
        server.client.close()
