"""The tables, and how they are opened: SQLite in WAL mode by default, PostgreSQL by URL.

Every row of a tenant carries its id, and every query by a request filters on it.
"""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, date, datetime
from typing import Any

import orjson
from sqlalchemy import (
    JSON,
    BigInteger,
    Date,
    DateTime,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker


class Utc(TypeDecorator[datetime]):
    """A time with its zone, kept in UTC; SQLite forgets zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Into the database."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Out of the database."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {datetime: Utc, dict[str, Any]: JSON, bytes: LargeBinary}  # noqa: RUF012  # SQLAlchemy's way


class Tenant(Base):
    """A customer; nothing of one is visible to another."""

    __tablename__ = "tenants"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created: Mapped[datetime]


class ApiKey(Base):
    """An API key: its public half in the clear, its secret half as a hash."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    secret_sha256: Mapped[bytes]
    scopes: Mapped[str] = mapped_column(String(200))
    created: Mapped[datetime]
    revoked: Mapped[datetime | None]


class WatermarkKey(Base):
    """A watermark or signing key: what is public as JSON, the secret under a data key under the master key."""

    __tablename__ = "watermark_keys"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    info: Mapped[dict[str, Any]]
    wrapped_data_key: Mapped[bytes]
    sealed_secret: Mapped[bytes]
    master_key_id: Mapped[str] = mapped_column(String(64))


class AuditEvent(Base):
    """Every use of a key, and every change: who, what, when, with what outcome; no text and no secret."""

    __tablename__ = "audit_events"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    at: Mapped[datetime]
    tenant_id: Mapped[str] = mapped_column(String(64))
    api_key_id: Mapped[str | None] = mapped_column(String(32))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str | None] = mapped_column(String(200))
    detail: Mapped[dict[str, Any]]
    __table_args__ = (Index("audit_by_tenant", "tenant_id", "id"),)


class Budget(Base):
    """How often an API key has tested a watermark key on a day."""

    __tablename__ = "budgets"
    tenant_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    api_key_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    used: Mapped[int] = mapped_column(Integer)


class Job(Base):
    """A corpus to be tested. The texts and the ledger are files; this row says who works on it and until when."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    api_key_id: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16), index=True)
    created: Mapped[datetime]
    updated: Mapped[datetime]
    idempotency_key: Mapped[str | None] = mapped_column(String(200))
    request_sha256: Mapped[str] = mapped_column(String(64))
    options: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any]]
    error: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer)
    lease_owner: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[float | None] = mapped_column(Float)
    __table_args__ = (UniqueConstraint("tenant_id", "idempotency_key", name="jobs_idempotency"),)


class StoredReport(Base):
    """An audit report: its JSON, from which the page is rendered."""

    __tablename__ = "reports"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    job_id: Mapped[str | None] = mapped_column(String(40))
    created: Mapped[datetime]
    content: Mapped[bytes]


def open_engine(url: str) -> Engine:
    """An engine for a URL; SQLite gets a lock timeout, WAL and enforced foreign keys."""
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, json_serializer=_json)
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False}, json_serializer=_json)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("busy_timeout=30000", "foreign_keys=ON", "synchronous=NORMAL"):
            cursor.execute(f"PRAGMA {pragma}")
        _use_write_ahead_log(cursor)
        cursor.close()

    return engine


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _use_write_ahead_log(cursor: Any, patience: float = 30.0) -> None:
    """Switch the file to WAL, which needs it alone for a moment.

    SQLite does not apply busy_timeout to this switch where waiting could deadlock: of two processes that open a new
    file together one is told at once that it is locked. It has only to ask again.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as refused:
            if refused.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def sessions(engine: Engine) -> sessionmaker[Any]:
    """Makes sessions; use `with sessions.begin() as session:` for a transaction."""
    return sessionmaker(engine, expire_on_commit=False)
