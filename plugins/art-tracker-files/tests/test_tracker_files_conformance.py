"""art-tracker-files under ART's suites; also a cell of the conformance matrix."""

from collections import Counter
from pathlib import Path

import pytest

from art_conformance import KeptModel, KeptRow, PluginConformance, TrackerConformance
from art_tracker_files import read_history, read_trajectories


class TestTrackerFilesPlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "tracker-files"


class TestTrackerFiles(TrackerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "tracker-files"

    @pytest.fixture(scope="class")
    @classmethod
    def read_back(cls):
        return kept


def kept(folder: Path, project: str, name: str) -> KeptModel:
    own = {"step", "split", "recorded_at"}
    model = folder / project / "models" / name
    rows = [
        KeptRow(step=row["step"], split=row["split"], metrics={name: row[name] for name in row.keys() - own})
        for row in read_history(model / "history.jsonl")
    ]
    counts: Counter[tuple[int, str]] = Counter()
    for file in model.glob("trajectories/*/*.parquet"):
        for group in read_trajectories(file):
            counts[int(file.stem), file.parent.name] += len(group.trajectories) + len(group.exceptions)
    return KeptModel(rows=rows, trajectories=counts)
