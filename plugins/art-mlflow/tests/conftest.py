"""What MLflow keeps in its database, read without it: importing it takes seconds, and sets up the process's loggers."""

import contextlib
import json
import math
import sqlite3
import sys

import pytest

from art_conformance import KeptModel, KeptRow

RUN = """
SELECT run_uuid, status FROM runs JOIN experiments USING (experiment_id)
WHERE experiments.name = ? AND runs.name = ? AND runs.lifecycle_stage = 'active'
"""
METRICS = "SELECT timestamp, step, key, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY timestamp"


@pytest.fixture(scope="session")
def in_database():
    """A function from a folder with mlflow.db, a project and a model's name to the KeptModel of its only run."""
    return _kept


@pytest.fixture(scope="session")
def run_of():
    """A function from a folder with mlflow.db, a project and a model's name to the only run's id and status."""
    return _run_of


def _run_of(folder, project, name):
    with _database(folder) as database:
        (run,) = database.execute(RUN, (project, name)).fetchall()
    return run


def _kept(folder, project, name):
    run_id, _ = _run_of(folder, project, name)
    with _database(folder) as database:
        tags = dict(database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run_id,)))
        told = database.execute(METRICS, (run_id,)).fetchall()
    names = {key.removeprefix("metric_name/"): json.loads(tags[key]) for key in tags if key.startswith("metric_name/")}
    rows, counts = {}, {}
    for at_ms, step, key, value, is_nan in told:
        if key.startswith("trajectories/"):
            where = step, key.removeprefix("trajectories/").removesuffix("_total")
            counts[where] = counts.get(where, 0) + int(value)
        else:
            rows.setdefault((at_ms, step), {})[names.get(key, key)] = _number(value, is_nan)
    return KeptModel(rows=[KeptRow(step=step, metrics=row) for (_, step), row in rows.items()], trajectories=counts)


def _number(value, is_nan):
    """MLflow keeps an infinity as the largest number, and says beside it when a value is none."""
    if is_nan:
        return math.nan
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value


def _database(folder):
    return contextlib.closing(sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True))
