"""The tables, and how a database is opened so that several threads and processes can write to it. Knows nothing of what
the rows mean; calls block, so that a server makes them in a thread.

Every writing transaction waits for the one before it, in SQLite and in PostgreSQL alike, so that what is read in it
stays true until it ends. Those that only read (`reading`) wait for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
    text,
)

from .upgrades import bring_up_to_date

_LOCK_LIMIT_S = 20.0
# Any number that no other program of this database takes for an advisory lock.
_WRITE_LOCK = 7_236_001

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

MODELS = Table(
    "models",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("entity", String(128), nullable=False),
    Column("project", String(128), nullable=False),
    Column("name", String(128), nullable=False),
    Column("base_model", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted_at", Float),
)
Index(
    "models_by_name",
    MODELS.c.entity,
    MODELS.c.project,
    MODELS.c.name,
    unique=True,
    sqlite_where=MODELS.c.deleted_at.is_(None),
    postgresql_where=MODELS.c.deleted_at.is_(None),
)

CHECKPOINTS = Table(
    "checkpoints",
    METADATA,
    Column("model_id", String(32), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("metrics", Text, nullable=False),
    Column("created_at", Float, nullable=False),
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

EVENTS = Table(
    "events",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String(32), nullable=False),
    Column("type", String(64), nullable=False),
    Column("data", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)
Index("events_of_job", EVENTS.c.job_id, EVENTS.c.number)

ANSWERS = Table(
    "answers",
    METADATA,
    Column("entity", String(128), primary_key=True),
    Column("idempotency_key", String(128), primary_key=True),
    Column("request_digest", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)


def open_database(where: Path | str) -> Engine:
    """Open a SQLite file in WAL mode, or a database by its URL, and bring its tables up to date.

    A locked database is waited for, 20 s. Raises UnknownRevision for one of a later version.
    """
    url = make_url(where) if isinstance(where, str) and "://" in where else make_url(f"sqlite:///{where}")
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": _LOCK_LIMIT_S})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername="postgresql+psycopg")
        engine = create_engine(url, pool_pre_ping=True)
        event.listen(engine, "begin", _begin_postgresql)
    try:
        bring_up_to_date(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes nothing, and so waits for no other."""
    with engine.execution_options(art_reading=True).begin() as connection:
        yield connection


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver's own BEGIN comes too late: a transaction that reads first could not become a writing one.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN" if _only_reads(connection) else "BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    if not _only_reads(connection):
        connection.execute(text(f"SELECT set_config('lock_timeout', '{int(_LOCK_LIMIT_S * 1000)}', true)"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_WRITE_LOCK})"))


def _only_reads(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("art_reading"))
