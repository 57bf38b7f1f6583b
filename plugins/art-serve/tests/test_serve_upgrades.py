"""A database of an older version is brought up to date with what is in it; one of a later version is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, make_url, text

from art_serve import database, job_queue, keys, upgrades

MIGRATIONS = Path(upgrades.__file__).parent / "migrations"


def test_the_tables_of_a_new_database_are_those_of_the_code(database_url: str) -> None:
    engine = database.open_database(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, database.METADATA) == []
    engine.dispose()
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == upgrades.LATEST


def test_the_first_revision_with_data_in_it_is_upgraded_and_nothing_is_lost(database_url: str) -> None:
    url = make_url(database_url if "://" in database_url else f"sqlite:///{database_url}")
    older = create_engine(url.set(drivername="postgresql+psycopg") if "postgres" in url.drivername else url)
    with older.begin() as connection:
        upgrades.upgrade(connection, "0001")
        connection.execute(
            text("INSERT INTO keys (id, entity, digest, created_at) VALUES ('k', 'one', :digest, 1.0)"),
            {"digest": "0" * 64},
        )
        connection.execute(
            text(
                "INSERT INTO jobs (id, entity, model_id, idempotency_key, payload, state, step, worker, lease_until)"
                " VALUES ('j1', 'one', 'm', 'a', '{}', 'running', 3, 'w', 1.0), "
                " ('j2', 'one', 'm', 'b', '{}', 'queued', NULL, NULL, NULL)"
            )
        )
    older.dispose()
    for _ in range(2):
        engine = database.open_database(database_url)
        assert [(key.id, key.entity) for key in keys.list_keys(engine)] == [("k", "one")]
        engine.dispose()
    engine = database.open_database(database_url)
    taken = job_queue.claim(engine, "next", lease_s=10)
    assert taken is not None
    assert (taken.id, taken.step) == ("j1", 3)
    job_queue.finish(engine, "j1", "next", events=[("training_ended", {"step": 3})])
    following = job_queue.claim(engine, "next", lease_s=10)
    assert following is not None
    assert following.id == "j2"
    engine.dispose()


def test_a_database_of_a_later_version_is_refused_untouched(database_url: str) -> None:
    engine = database.open_database(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(upgrades.UnknownRevision, match="a later version"):
        database.open_database(database_url)
    engine.dispose()
