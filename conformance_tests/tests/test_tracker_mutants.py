"""For each check of a tracker one that breaks it and nothing else, and a sound one that meets them all."""

from __future__ import annotations

import json

import pytest

from art_conformance.catalogue import requirements_of

pytest_plugins = ["pytester"]
REQUIREMENTS = {requirement.id: requirement for requirement in requirements_of("TrackerConformance")}

SOUND = """
import asyncio, json, os, time
from pathlib import Path
from art_core import ModelKey, hookimpl

art_api = 1

def write(model, line):
    folder = ModelKey(model.project, model.name).folder(Path(model.base_path))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (folder / "toy.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")

def counted(groups):
    return sum(len(group.trajectories) + len(group.exceptions) for group in groups)

@hookimpl
async def art_log_metrics(model, metrics, step, split):
    await asyncio.to_thread(write, model, {"step": step, "split": split, "metrics": metrics})

@hookimpl
async def art_log_trajectories(model, trajectory_groups, step, split):
    line = {"step": step, "split": split, "count": counted(trajectory_groups)}
    await asyncio.to_thread(write, model, line)

@hookimpl
async def art_checkpoint_published(model, checkpoint):
    if model.report_metrics is None and checkpoint.path.is_dir():
        await asyncio.to_thread(write, model, {"adapter": sorted(os.listdir(checkpoint.path))})
"""
METADATA = (
    "Metadata-Version: 2.1\nName: toy\nVersion: 0.1\nRequires-Dist: art-core>=0.1,<0.2\nRequires-Dist: filelock>=3\n"
)
TEST = """
import json
from collections import Counter
import pytest
from art_conformance import KeptModel, KeptRow, TrackerConformance

def kept(folder, project, name):
    rows, counts = [], Counter()
    file = folder / project / "models" / name / "toy.jsonl"
    for line in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
        if "metrics" in line:
            rows.append(KeptRow(step=line["step"], split=line["split"], metrics=line["metrics"]))
        elif "count" in line:
            counts[line["step"], line["split"]] += line["count"]
    return KeptModel(rows=rows, trajectories=counts)

class TestToy(TrackerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "toy"

    @pytest.fixture(scope="class")
    @classmethod
    def read_back(cls):
        return kept
"""
OPEN = '    with (folder / "toy.jsonl").open("a") as file:\n'
MKDIR = "    folder.mkdir(parents=True, exist_ok=True)\n"
METRICS = '    await asyncio.to_thread(write, model, {"step": step, "split": split, "metrics": metrics})\n'

# The check that must notice → what is replaced in the sound tracker, and what by.
MUTANTS: dict[str, tuple[str, str]] = {
    "TRK-001": ("@hookimpl\nasync def art_log_", "async def _log_"),
    "TRK-002": (METRICS, '    step += model.name == "agent" and step == 2\n' + METRICS),
    "TRK-003": (METRICS, '    if model.name == "twice":\n        metrics = {"loss/train": 0.5}\n' + METRICS),
    "TRK-004": (METRICS, "    metrics = {k: v for k, v in metrics.items() if v == v}\n" + METRICS),
    "TRK-005": (METRICS, "    metrics = {k.replace('.', '_'): v for k, v in metrics.items()}\n" + METRICS),
    "TRK-006": ("return sum(", "return min(100, len(groups) * 100) if len(groups) > 25 else sum("),
    "TRK-007": (
        "def counted(groups):\n",
        "def counted(groups):\n    [str(t.messages()[-1]['content']).encode() for g in groups for t in g]\n",
    ),
    "TRK-008": ("ModelKey(model.project, model.name)", 'ModelKey("shop", model.name)'),
    "TRK-009": (
        OPEN,
        "    mode = 'a' if str(folder) in vars(write) else 'w'\n    vars(write)[str(folder)] = True\n"
        + OPEN.replace('"a"', "mode"),
    ),
    "TRK-010": (
        METRICS,
        "    try:\n    " + METRICS + "    except OSError as error:\n        raise SystemExit(str(error))\n",
    ),
    "TRK-011": (MKDIR, "    try:\n    " + MKDIR + "    except OSError:\n        return\n"),
    "TRK-012": ("        file.write(", "        if time.monotonic() - began < 0.2:\n            file.write("),
    "TRK-013": (METRICS, METRICS.replace("await asyncio.to_thread(write, model, ", "write(model, ")),
    "TRK-014": (METRICS, "    try:\n    " + METRICS + "    except asyncio.CancelledError:\n        pass\n"),
    "TRK-015": (METRICS, METRICS + "    metrics.clear()\n"),
    "TRK-016": ("model.report_metrics is None and ", ""),
    "TRK-017": ("import asyncio, json", "import filelock, asyncio, json"),
    "TRK-018": ('"count": counted(trajectory_groups)}', '"count": counted(trajectory_groups), "of": repr(model)}'),
    "TRK-019": (" and checkpoint.path.is_dir()", ""),
}


def failing(pytester: pytest.Pytester, source: str) -> set[str]:
    """The ids that a tracker does not meet."""
    site = pytester.path / "site"
    files = {
        "toy.py": source,
        "toy-0.1.dist-info/METADATA": METADATA,
        "toy-0.1.dist-info/entry_points.txt": "[art]\ntoy = toy\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    pytester.syspathinsert(site)
    pytester.makepyfile(TEST)
    report = pytester.path / "report.json"
    options = ["-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function", "--tb=no"]
    pytester.runpytest(*options, f"--conformance-report={report}")
    [content] = json.loads(report.read_text(encoding="utf-8"))
    assert {entry["id"] for entry in content["checks"]} == MUTANTS.keys()
    assert not [entry["id"] for entry in content["checks"] if entry["outcome"] == "not run"]
    return {entry["id"] for entry in content["checks"] if entry["outcome"] == "NOT MET"}


def test_every_check_has_a_mutant() -> None:
    assert REQUIREMENTS.keys() == MUTANTS.keys()
    assert all(part in SOUND for part, _ in MUTANTS.values())


@pytest.mark.slow
def test_the_sound_tracker_meets_every_check(pytester: pytest.Pytester) -> None:
    assert failing(pytester, SOUND) == set()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("id", MUTANTS)
def test_exactly_the_check_notices(pytester: pytest.Pytester, id: str) -> None:
    assert failing(pytester, SOUND.replace(*MUTANTS[id])) == {id}
