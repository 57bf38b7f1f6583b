"""Brings a database to the tables of this version: a new one from nothing, an older one with what is in it.

Knows revisions and no table's meaning. A database of a later version is refused, since nobody knows what it holds.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

#: The revision of these tables, the last in `migrations/versions`.
LATEST = "0002"
_MIGRATIONS = Path(__file__).parent / "migrations"
_KNOWN = ("0001", "0002")


class UnknownRevision(RuntimeError):
    """The database was made by another version of art-serve than this."""


def bring_up_to_date(engine: Engine) -> None:
    """Upgrade to LATEST, all of it or nothing; another process that does so meanwhile is waited for.

    Raises UnknownRevision.
    """
    with engine.begin() as connection:
        there = revision_of(connection)
        if there == LATEST:
            return
        if there is not None and there not in _KNOWN:
            raise UnknownRevision(
                f"the database has the revision {there}, and this art-serve knows none behind {LATEST}: a later version"
                " made it. Install that version, or give the backup from before its upgrade."
            )
        upgrade(connection, LATEST)


def upgrade(connection: Connection, revision: str) -> None:
    """Upgrade within a transaction that the caller ends."""
    # Alembic takes a third of a second to import, and a database is seldom out of date.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def revision_of(connection: Connection) -> str | None:
    """The revision that a database has; None for an empty one."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
