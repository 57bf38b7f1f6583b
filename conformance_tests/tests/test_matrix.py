"""The matrix: what it is made of, what each cell's end means, that it takes up where it was stopped, how it is read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from art_conformance.catalogue import REVISION
from art_conformance.command_line import cli
from art_conformance.matrix import (
    CELL_BYTES,
    CellReport,
    CellVerdict,
    cells_at_once,
    kept_report,
    run_cell,
    run_matrix,
)
from art_conformance.matrix_cells import Cell, Chosen, cells, chosen, elsewhere
from art_conformance.matrix_page import Run, badge, page
from art_core import installed_plugins
from art_core.errors import PluginNotInstalled

PLUGINS = Cell("plugins", ("TestPlugin",), ("--plugin", "torch"), ("PluginConformance",))
MISSING = Cell("plugins", ("TestPlugin",), ("--plugin", "no-such-plugin"))


def test_a_matrix_has_each_engine_once_and_backend_local_with_every_pair() -> None:
    made = cells(Chosen(["torch", "vllm"], ["torch", "tune"], ["local", "far"]), {"far": "{}"})
    assert [cell.name for cell in made] == [
        "plugins", "inference-torch", "inference-vllm", "training-torch", "training-tune",
        "backend-local-torch-torch", "backend-local-torch-tune", "backend-local-vllm-torch", "backend-local-vllm-tune",
        "backend-far",
    ]  # fmt: skip
    assert made[-1].arguments[:4] == ["--backend", "far", "--backend-args", "{}"]
    assert made[6].arguments[:6] == [
        "--backend", "local", "--inference-engine", "torch", "--training-engine", "tune",
    ]  # fmt: skip


def test_what_is_installed_is_chosen_where_nothing_is_asked_for_the_default_first() -> None:
    names = chosen(installed_plugins(), [], [], [])
    assert (names.inference_engines[0], names.training_engines[0], names.backends[0]) == ("torch", "torch", "local")
    assert {"torch", "vllm", "sglang"} <= set(names.inference_engines)
    some = chosen(installed_plugins(), ["vllm"], [], [])
    assert (some.inference_engines, list(some.trackers)) == (["vllm"], [])
    assert some.training_engines == names.training_engines
    only_trackers = chosen(installed_plugins(), [], [], [], ["wandb"])
    assert only_trackers == Chosen([], [], [], ["wandb"])
    assert chosen(installed_plugins(), [], [], ["local"], ["wandb"]).trackers == ["wandb"]
    with pytest.raises(PluginNotInstalled, match="vlm"):
        chosen(installed_plugins(), ["vlm"], [], [])


def test_a_backend_of_another_machine_is_untestable_until_it_is_given_what_it_needs(tmp_path: Path) -> None:
    names = Chosen([], [], ["far"])
    (_, alone) = cells(names, {}, remote={"far"})
    assert "--backend-args far=" in alone.lacks
    report = run_cell(alone, installed_plugins(), tmp_path)
    assert (report.verdict, report.reason) == (CellVerdict.UNTESTABLE, alone.lacks)
    (_, with_arguments) = cells(names, {"far": "{}"}, remote={"far"})
    (_, with_tests) = cells(names, {}, {"far": "test_far.py"}, remote={"far"})
    assert not with_arguments.lacks
    assert (with_tests.lacks, with_tests.arguments) == ("", ["test_far.py"])
    assert elsewhere(installed_plugins(), ["local", "serverless"]) == {"serverless"}


def test_a_tracker_is_untestable_until_it_is_said_how_what_it_keeps_is_read_back() -> None:
    names = chosen(installed_plugins(), [], [], [])
    assert list(names.trackers) == ["mlflow", "tracker-files", "trackio", "wandb"]
    (_, alone) = cells(Chosen([], [], [], ["ledger"]), {})
    assert "--tests ledger=FILE" in alone.lacks
    (_, with_tests) = cells(Chosen([], [], [], ["ledger"]), {}, {"ledger": "test_ledger.py"})
    assert (with_tests.name, with_tests.lacks, with_tests.arguments) == ("tracker-ledger", "", ["test_ledger.py"])
    with pytest.raises(PluginNotInstalled, match=r"'trackoi'\. Did you mean 'trackio'\?"):
        chosen(installed_plugins(), [], [], [], ["trackoi"])


@pytest.mark.usefixtures("sigint_is_heard")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_matrix_that_is_ended_leaves_no_cell_running(tmp_path: Path, how: signal.Signals) -> None:
    program = Path(sys.executable).with_name("art-conformance")
    command = [program, "matrix", "--only", "inference-torch", "--inference-engine", "torch", "--folder", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as matrix:
        started = psutil.Process(matrix.pid)
        deadline = time.monotonic() + 60
        while not (below := started.children(recursive=True)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert below, "no cell was started"
        time.sleep(2)  # so that the cell has processes of its own
        below = started.children(recursive=True)
        matrix.send_signal(how)
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive
    assert not list(tmp_path.glob("*.json"))


MEETING = """
import time
from pathlib import Path

def test_two_are_here():
    (here := Path({here!r})).touch()
    until = time.monotonic() + {patience_s}
    while not Path({other!r}).exists() and time.monotonic() < until:
        time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_cells_run_as_many_at_once_as_was_asked(tmp_path: Path, at_once: int) -> None:
    both = []
    for name, other in (("a", "b"), ("b", "a")):
        here, there = (str(tmp_path / f"{each}.here") for each in (name, other))
        test = tmp_path / f"test_{name}.py"
        test.write_text(MEETING.format(here=here, other=there, patience_s=60 if at_once == 2 else 0), encoding="utf-8")
        both.append(Cell(name, tests=str(test)))
    heard: list[tuple[str, bool]] = []
    reports = run_matrix(
        both,
        installed_plugins(),
        tmp_path / "kept",
        at_once=at_once,
        told=lambda cell, report: heard.append((cell.name, report is not None)),
    )
    assert [report.cell for report in reports] == ["a", "b"]
    assert sorted(heard) == [("a", False), ("a", True), ("b", False), ("b", True)]
    assert [ended for _, ended in heard] == [False, at_once == 1, at_once == 2, True]


def test_with_a_gpu_or_little_memory_cells_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("art_conformance.matrix.accelerators", lambda: ())
    for free, expected in ((1, 1), (CELL_BYTES * 2 + 1, 2), (CELL_BYTES * 100, 4)):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert cells_at_once() == expected
    monkeypatch.setattr("art_conformance.matrix.accelerators", lambda: (object(),))
    assert cells_at_once() == 1


@pytest.mark.slow
def test_a_cell_that_has_a_verdict_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    heard: list[Any] = []

    def run(**options: Any) -> CellReport:
        (report,) = run_matrix(
            [PLUGINS], installed_plugins(), tmp_path, told=lambda cell, report: heard.append(report), **options
        )
        return report

    first = run()
    assert (first.verdict, first.reason) == (CellVerdict.CONFORMANT, "")
    assert first.count("met") == 14
    assert first.versions["art-core"]
    log = (tmp_path / "plugins.log").stat().st_mtime_ns
    assert run() == first
    assert (tmp_path / "plugins.log").stat().st_mtime_ns == log
    run(again=True)
    assert (tmp_path / "plugins.log").stat().st_mtime_ns > log
    assert [None if report is None else report.verdict.value for report in heard] == [None, "conformant"] * 3
    kept = json.loads((tmp_path / "plugins.json").read_text(encoding="utf-8"))
    for other in ({"versions": {"art-core": "0.0.1"}}, {"sources": "of before"}, {"expected": []}):
        (tmp_path / "plugins.json").write_text(json.dumps({**kept, **other}), encoding="utf-8")
        assert kept_report(PLUGINS, installed_plugins(), tmp_path) is None
    assert run().versions == first.versions


REPORTED = """
from art_conformance import faults

def pytest_runtest_call(item):
    if item.name.startswith("test_declares_api"):
        {raising}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raising", "verdict", "said"),
    [
        ("raise MemoryError('no more')", CellVerdict.MACHINE, "PLG-002 MemoryError: no more"),
        (
            "raise faults.PrerequisiteMissing('pip install that')",
            CellVerdict.UNTESTABLE,
            "PLG-002 pip install that",
        ),
        ("assert 0, 'mine'", CellVerdict.NOT_CONFORMANT, "PLG-002 AssertionError: mine"),
    ],
)
def test_whose_fault_a_check_is_decides_the_verdict_of_its_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raising: str, verdict: CellVerdict, said: str
) -> None:
    (tmp_path / "spoiling.py").write_text(REPORTED.format(raising=raising), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (kept := tmp_path / "kept").mkdir()
    report = run_cell(PLUGINS, installed_plugins(), kept, pytest_options=("-p", "spoiling"))
    assert report.verdict is verdict
    assert report.reason.startswith(said)
    assert [file.name for file in kept.iterdir()] == ["plugins.log"]


LISTED = """
import os
from pathlib import Path

import pytest
from art_conformance import PluginConformance

class TestMine(PluginConformance):
    known_failures = {known}

    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        Path("left.db").touch()  # as a tracker does that is told of no other place
        return "torch"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("known", "suites", "verdict", "said"),
    [
        ({}, ("PluginConformance",), CellVerdict.CONFORMANT, ""),
        (
            {},
            ("PluginConformance", "TrackerConformance"),
            CellVerdict.INCOMPLETE,
            "TrackerConformance was not run: test_mine.py has no class of it",
        ),
        (
            {"PLG-014": "it has no types"},
            ("PluginConformance",),
            CellVerdict.NOT_CONFORMANT,
            "PLG-014 [XPASS(strict)] it has no types (unexpected pass)",
        ),
    ],
)
def test_a_cell_of_ones_own_tests_is_held_against_every_suite_of_its_kind(
    tmp_path: Path, known: dict[str, str], suites: tuple[str, ...], verdict: CellVerdict, said: str
) -> None:
    (tests := tmp_path / "test_mine.py").write_text(LISTED.format(known=known), encoding="utf-8")
    (kept := tmp_path / "kept").mkdir()
    report = run_cell(Cell("tracker-mine", tests=str(tests), suites=suites), installed_plugins(), kept)
    assert (report.verdict, report.reason) == (verdict, said)
    assert [file.name for file in kept.iterdir()] == ["tracker-mine.log"], "what it leaves where it runs is kept"


def test_every_cell_has_the_suites_of_its_kind() -> None:
    made = cells(
        Chosen(["torch"], ["torch"], ["local", "far", "near"], ["ledger"]), {}, {"near": "test_near.py"}, {"far"}
    )
    backend = ("PublicationConformance", "BackendConformance")
    assert {cell.name: cell.suites for cell in made} == {
        "plugins": ("PluginConformance",),
        "tracker-ledger": ("PluginConformance", "TrackerConformance"),
        "inference-torch": ("InferenceEngineConformance",),
        "training-torch": ("TrainingEngineConformance",),
        "backend-local-torch-torch": backend,
        "backend-far": backend,
        "backend-near": backend,
    }


@pytest.mark.slow
def test_a_must_that_is_not_met_is_not_conformant_and_named(tmp_path: Path) -> None:
    report = run_cell(MISSING, installed_plugins(), tmp_path)
    assert report.verdict is CellVerdict.NOT_CONFORMANT
    assert report.reason.startswith("PLG-")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "it was ended by SIGKILL"),
        ("import time\ntime.sleep(60)", "it had not ended after 3 s"),
        ("raise RuntimeError('spoilt')", "pytest itself failed"),
        ("def pytest_collection_modifyitems(items): items.clear()", "no check was found"),
        (
            "def pytest_collection_modifyitems(items): del items[3:]",
            "not every MUST was run",
        ),
    ],
)
def test_a_fault_of_the_run_says_nothing_of_the_plugin_and_is_tried_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str, said: str
) -> None:
    (tmp_path / "spoiling.py").write_text(plugin, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    limit_s = 3.0 if "sleep" in plugin else 120.0
    (report,) = run_matrix(
        [PLUGINS], installed_plugins(), tmp_path / "kept", limit_s=limit_s, pytest_options=("-p", "spoiling")
    )
    assert report.verdict is CellVerdict.MACHINE
    assert said in report.reason
    assert "plugins.log" in report.reason
    if report.reason.startswith("it had not ended"):
        (tried_again,) = run_matrix([PLUGINS], installed_plugins(), tmp_path / "kept")
        assert tried_again.verdict is CellVerdict.CONFORMANT


def test_an_engine_without_its_environment_is_untestable_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ART_CACHE_DIR", str(tmp_path / "cache"))
    cell = Cell(
        "inference-sglang", ("TestInferenceEngine",), ("--inference-engine", "sglang"), inference_engine="sglang"
    )
    report = run_cell(cell, installed_plugins(), tmp_path)
    assert report.verdict is CellVerdict.UNTESTABLE
    assert "art engines install sglang" in report.reason


def report_of(name: str, verdict: CellVerdict, **more: Any) -> CellReport:
    return CellReport(cell=name, revision=1, verdict=verdict, **more)


def test_the_page_and_the_badge_never_count_what_was_not_run_as_met() -> None:
    checks = [{"level": "SHOULD", "outcome": "NOT MET"}, {"level": "MUST", "outcome": "met"}]
    suites = [{"suite": "InferenceEngineConformance", "counts": {"met": 1, "NOT MET": 1}, "checks": checks}]
    good = report_of("inference-torch", CellVerdict.CONFORMANT, suites=suites, seconds=12.3, versions={"torch": "2.13"})
    missing = report_of("inference-vllm", CellVerdict.UNTESTABLE, reason="art engines install vllm")
    late = report_of("training-torch", CellVerdict.MACHINE, reason="it had not ended")
    bad = report_of("training-tune", CellVerdict.NOT_CONFORMANT, reason="TRN-110 off by 2")
    half = report_of(
        "backend-far",
        CellVerdict.INCOMPLETE,
        seconds=20.0,
        expected=("PublicationConformance", "BackendConformance"),
        suites=[{"suite": "BackendConformance", "counts": {}, "checks": []}],
    )
    text = page([good, missing, late, bad, half], Run(cells=1, at_once=2, seconds=14.4))
    assert "| inference-torch | conformant | InferenceEngine | 1 | 0 | 1 | 12 s |" in text
    assert "| inference-vllm | untestable |  | 0 | 0 | 0 |  |" in text
    assert "| backend-far | incomplete | Backend; not run: Publication | 0 | 0 | 0 | 20 s |" in text
    assert "all cells, one after another: 32 s" in text
    assert "the embedded default (inference-torch): 12 s" in text
    assert "14 s for 1 of 5 cells, 2 at a time" in text
    assert "- **training-tune**: TRN-110 off by 2" in text
    assert "| torch | 2.13 |" in text
    assert badge([good]) == {
        "schemaVersion": 1,
        "label": "ART conformance",
        "message": f"revision {REVISION}, 1 of 1",
        "color": "brightgreen",
    }
    for others, colour in (([missing] * 20, "lightgrey"), ([late], "lightgrey"), ([half], "lightgrey"), ([bad], "red")):
        said = badge([good, *others])
        assert (said["color"], said["message"]) == (colour, f"revision {REVISION}, 1 of {1 + len(others)}")
    assert badge([])["color"] == "lightgrey"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inference-engine", "vlm"], "vlm"),
        (["--only", "nothing-like-it"], "No cell begins with 'nothing-like-it'. There are: plugins, "),
        (["--backend-args", "local=[1]"], "after the backend's name and = comes a JSON object"),
        (["--backend-args", "local"], "after the backend's name and = comes a JSON object"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(tmp_path: Path, arguments: list[str], said: str) -> None:
    told = CliRunner().invoke(cli, ["matrix", "--folder", str(tmp_path / "kept"), *arguments])
    assert told.exit_code == 2
    assert said in told.stderr
    assert not (tmp_path / "kept").exists()


@pytest.mark.slow
def test_the_command_writes_a_page_a_badge_and_says_by_its_status_what_was_found(tmp_path: Path) -> None:
    told = CliRunner().invoke(cli, ["matrix", "--folder", str(tmp_path), "--only", "plugins"])
    assert told.exit_code == 0, told.stdout
    assert "| plugins | conformant |" in (tmp_path / "matrix.md").read_text(encoding="utf-8")
    said = json.loads((tmp_path / "badge.json").read_text(encoding="utf-8"))
    assert said["message"].startswith(f"revision {REVISION}, 1 of ")
    assert said["color"] == "lightgrey", "cells that were left out aren't held against anything"

    (tests := tmp_path / "test_nothing.py").write_text("", encoding="utf-8")
    other = ["--only", "tracker-tracker-files", "--tests", f"tracker-files={tests}"]
    assert CliRunner().invoke(cli, ["matrix", "--folder", str(tmp_path), *other]).exit_code == 2
    written = (tmp_path / "matrix.md").read_text(encoding="utf-8")
    assert "| plugins | conformant |" in written, "a run of one cell took the others from the page"
    assert "| tracker-tracker-files | " in written
