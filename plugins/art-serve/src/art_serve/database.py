"""The tables, and how a SQLite file is opened so that several processes can write to it. Knows nothing of what the rows
mean; calls block, so that a server makes them in a thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)

_LOCK_LIMIT_S = 20.0

METADATA = MetaData()

KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("entity", String(128), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

JOBS = Table(
    "jobs",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("entity", String(128), nullable=False, index=True),
    Column("model_id", String(64), nullable=False, index=True),
    Column("idempotency_key", String(128), nullable=False),
    Column("payload", Text, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("step", Integer),
    Column("error", Text),
    Column("worker", String(64)),
    Column("lease_until", Float),
    Column("started_at", Float),
    UniqueConstraint("model_id", "idempotency_key"),
)


def open_database(path: Path) -> Engine:
    """Open a SQLite file in WAL mode, and make the tables that it lacks. A locked database is waited for, 20 s."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _LOCK_LIMIT_S})
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _take_write_lock)
    METADATA.create_all(engine)
    return engine


def _prepare(connection: Any, _record: object) -> None:
    # The driver's own BEGIN comes too late: a transaction that reads first could not become a writing one.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _take_write_lock(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
