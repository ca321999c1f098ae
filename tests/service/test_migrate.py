"""Migrations: they make what the tables say, from empty, by two processes at once, on both databases."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect
from sqlalchemy.exc import DatabaseError

from assay.service.database import Base, open_engine
from assay.service.migrate import upgrade

PROGRAM = """
import sys, time
from assay.service.database import open_engine
from assay.service.migrate import upgrade
engine = open_engine(sys.argv[1])
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
upgrade(engine)
"""


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return compare_metadata(context, Base.metadata)


def test_migrations_make_the_tables(engine: Engine) -> None:
    assert differences(engine) == []
    upgrade(engine)  # again changes nothing
    assert differences(engine) == []


def test_a_missing_column_would_be_noticed(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN error")
    assert differences(engine) != []


def test_a_new_file_that_another_process_writes_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "test.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    other.execute("CREATE TABLE theirs (n)")
    with sqlite3.connect(path, timeout=30) as plain, pytest.raises(sqlite3.OperationalError, match="locked"):
        plain.execute("PRAGMA journal_mode=WAL")  # the timeout alone is no help: SQLite does not wait here
    plain.close()
    release = threading.Timer(0.3, other.execute, ["COMMIT"])
    release.start()
    engine = open_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()
    release.join()
    other.close()


def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "test.db").write_bytes(b"no database " * 100)
    engine = open_engine(f"sqlite:///{tmp_path / 'test.db'}")
    began = time.monotonic()
    with pytest.raises(DatabaseError, match="not a database"):
        engine.connect()
    assert time.monotonic() - began < 5
    engine.dispose()


def test_processes_that_start_together(database_url: str) -> None:
    moment = str(time.time() + 3.0)
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, database_url, moment], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0], b"\n".join(messages for messages, _ in ended).decode()
    engine = create_engine(database_url)
    assert differences(engine) == []
    assert "alembic_version" in inspect(engine).get_table_names()
    engine.dispose()
