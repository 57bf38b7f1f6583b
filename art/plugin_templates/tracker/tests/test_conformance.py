"""art-tracker-example under ART's suites. `pytest --conformance-list` says what each check requires."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from art_conformance import KeptModel, KeptRow, PluginConformance, TrackerConformance


class TestExamplePlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "example"


class TestExampleTracker(TrackerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "example"

    @pytest.fixture(scope="class")
    @classmethod
    def read_back(cls) -> Callable[[Path, str, str], KeptModel]:
        return kept


def kept(folder: Path, project: str, name: str) -> KeptModel:
    """What the tracker kept of a model: the suite compares it with what it told the tracker."""
    rows, trajectories = [], {}
    file = folder / project / "models" / name / "example.jsonl"
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        if "metrics" in line:
            rows.append(KeptRow(step=line["step"], split=line["split"], metrics=line["metrics"]))
        if "rewards" in line:
            trajectories[line["step"], line["split"]] = len(line["rewards"]) + len(line["failed"])
    return KeptModel(rows=rows, trajectories=trajectories)
