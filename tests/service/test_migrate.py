"""Migrations: they make what the tables say, from empty, by two processes at once, on both databases."""

from __future__ import annotations

import subprocess
import sys
import time

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect

from assay.service.database import Base
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


def test_processes_that_start_together(database_url: str) -> None:
    moment = str(time.time() + 3.0)
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, database_url, moment], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in started:
        _, messages = process.communicate(timeout=60)
        assert process.returncode == 0, messages.decode()
    engine = create_engine(database_url)
    assert differences(engine) == []
    assert "alembic_version" in inspect(engine).get_table_names()
    engine.dispose()
