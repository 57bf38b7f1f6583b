"""art-trackio under ART's suites, with the real library; also a cell of the conformance matrix."""

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest

from art_conformance import KeptModel, KeptRow, PluginConformance, TrackerConformance


class TestTrackioPlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "trackio"


class TestTrackio(TrackerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "trackio"

    @pytest.fixture(scope="class")
    @classmethod
    def tracker_environment(cls):
        return lambda folder: {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}

    @pytest.fixture(scope="class")
    @classmethod
    def read_back(cls):
        return kept


def kept(folder: Path, project: str, name: str) -> KeptModel:
    # Its own reader takes its folder from the environment once, when it is imported.
    path = folder / "trackio" / f"{project}.db"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        found = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)).fetchall()
    rows, counts = [], {}
    for step, text in found:
        row = json.loads(text)
        numbers = {key: float(value) for key, value in row.items() if not key.startswith("trajectories/")}
        if numbers:
            rows.append(KeptRow(step=step, metrics=numbers))
        for key, value in row.items():
            if key.startswith("trajectories/") and key.endswith("_total"):
                counts[step, key.removeprefix("trajectories/").removesuffix("_total")] = value
    return KeptModel(rows=rows, trajectories=counts)
