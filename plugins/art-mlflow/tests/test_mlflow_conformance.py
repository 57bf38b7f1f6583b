"""art-mlflow under ART's suites, with the real library and its database; also a cell of the conformance matrix."""

import contextlib
import json
import math
import sqlite3
import sys

import pytest

from art_conformance import KeptModel, KeptRow, PluginConformance, TrackerConformance

OF_RUN = """
SELECT run_uuid FROM runs JOIN experiments USING (experiment_id)
WHERE experiments.name = ? AND runs.name = ? AND runs.lifecycle_stage = 'active'
"""


class TestMlflowPlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "mlflow"


class TestMlflow(TrackerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "mlflow"

    @pytest.fixture(scope="class")
    @classmethod
    def tracker_environment(cls):
        return lambda folder: {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}

    @pytest.fixture(scope="class")
    @classmethod
    def read_back(cls):
        return kept


def number(value, is_nan):
    """MLflow keeps an infinity as the largest number, and says beside it when a value is none."""
    largest = sys.float_info.max
    return math.nan if is_nan else math.copysign(math.inf, value) if abs(value) == largest else value


def kept(folder, project, name):
    # Importing MLflow here would set up the loggers of all other tests.
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)) as database:
        runs = database.execute(OF_RUN, (project, name)).fetchall()
        if not runs:
            return KeptModel()
        (run,) = runs
        tags = dict(database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", run))
        told = database.execute(
            "SELECT timestamp, step, key, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY timestamp", run
        ).fetchall()
    names = {key.removeprefix("metric_name/"): json.loads(tags[key]) for key in tags if key.startswith("metric_name/")}
    rows, counts = {}, {}
    for at_ms, step, key, value, is_nan in told:
        if key.startswith("trajectories/"):
            where = step, key.removeprefix("trajectories/").removesuffix("_total")
            counts[where] = counts.get(where, 0) + int(value)
        else:
            rows.setdefault((at_ms, step), {})[names.get(key, key)] = number(value, is_nan)
    return KeptModel(rows=[KeptRow(step=step, metrics=row) for (_, step), row in rows.items()], trajectories=counts)
