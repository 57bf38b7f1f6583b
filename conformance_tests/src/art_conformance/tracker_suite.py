"""`TrackerConformance`: what a tracker is told is kept, and whatever becomes of it costs the step nothing.

A tracker is judged by what it gives back: the author says where it writes and how that is read. Each scenario is told
in a process of its own, since part of a tracker's work may be done when a process ends. Knows no tracker.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement as PipRequirement

from art_core import Capability, ModelKey
from art_core.loading import PluginInfo

from .plugin_fixtures import PluginFixtures
from .requirements import MUST, check
from .tracker_process import SLOW_S, Noted, told
from .tracker_reports import (
    AFTERWARDS,
    AGENT,
    ANYTHING,
    ELSEWHERE,
    GOES_ON,
    MANY,
    NAMED,
    NAMES,
    PATIENT,
    REMOTE,
    SCENARIOS,
    SECRET,
    SHORT,
    STRANGE,
    TOGETHER,
    TOLD,
    TWICE,
    KeptModel,
    Report,
)

PROCESS_LIMIT_S = 240.0
_SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "ART_CONFORMANCE_TOKEN")
_IS_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")

ReadBack = Callable[[Path, str, str], KeptModel]
Environment = Callable[[Path], Mapping[str, str]]


class TrackerPart(Capability):
    """What a tracker listens to; implementing the hook declares it."""

    METRICS = "art_log_metrics", "Metrics are kept."
    TRAJECTORIES = "art_log_trajectories", "Trajectories are kept, or a table of them with their number."
    CHECKPOINTS = "art_checkpoint_published", "Checkpoints are kept as they are served."


@dataclass(frozen=True)
class Told:
    """A scenario that was told: what the process wrote, how it ended, and the files that are there since."""

    root: Path
    ended: int
    printed: str
    secrets: frozenset[str]

    @property
    def folder(self) -> Path:
        """The models' `base_path`."""
        return self.root / "seen" / "base"

    @cached_property
    def noted(self) -> Noted:
        """What was seen. The process must have come to its end."""
        assert self.ended == 0, f"the process that logged ended with {self.ended}: {self.printed[-1500:]}"
        result = self.root / "result.json"
        assert result.exists(), f"the process ended before it had told everything: {self.printed[-1500:]}"
        return Noted(**json.loads(result.read_text(encoding="utf-8")))

    @property
    def files(self) -> list[Path]:
        """Every file that is there since."""
        return sorted(file for file in (self.root / "seen").rglob("*") if file.is_file())

    def failures(self, hook: str) -> list[str]:
        """The warnings that an implementation of `hook` raised."""
        return [warned for warned in self.noted.warned if f"failed in {hook}:" in warned]


class TrackerConformance(PluginFixtures):
    """Give the fixtures `plugin_name`, the tracker's entry point; `read_back`, a function from a folder, a project and
    a model's name to the KeptModel that the tracker kept there; and where it needs any, `tracker_environment`, a
    function from that folder to the environment variables with which it reports, into that folder.
    """

    @pytest.fixture(scope="class")
    @classmethod
    def read_back(cls) -> ReadBack:
        raise pytest.UsageError(
            "give the fixture `read_back` (scope='class'): a function (folder, project, name) -> KeptModel"
        )

    @pytest.fixture(scope="class")
    @classmethod
    def tracker_environment(cls) -> Environment:
        return lambda _folder: {}

    @pytest.fixture(scope="class")
    @classmethod
    def hooks(cls, info: PluginInfo) -> tuple[str, ...]:
        """The hooks that the tracker implements."""
        assert not info.error, f"{info.name} can't be used: {info.error}"
        return info.hooks

    @pytest.fixture(scope="class")
    @classmethod
    def declared(cls, hooks: tuple[str, ...]) -> Collection[Capability]:
        return frozenset(part for part in TrackerPart if part.value in hooks)

    @pytest.fixture(scope="class")
    @classmethod
    def tell(
        cls, plugin_name: str, tracker_environment: Environment, tmp_path_factory: pytest.TempPathFactory
    ) -> Callable[..., Told]:
        """Tell a scenario, in the place of an earlier one or in a new one."""

        def tell(scenario: str, root: Path | None = None) -> Told:
            root = root or _place(tmp_path_factory.mktemp("tracker"), broken=scenario == "broken")
            own = dict(tracker_environment(root / "seen" / "base"))
            secrets = {SECRET, *(value for name, value in own.items() if _IS_SECRET.search(name) and len(value) > 7)}
            kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT") if name in os.environ}
            environment = {
                **kept,
                **dict.fromkeys(_SECRETS, SECRET),
                "HOME": str(root / "seen" / "home"),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "PYTHONDONTWRITEBYTECODE": "1",
                **own,
            }
            paths = (root / "seen" / "base", root / "checkpoint", root / "result.json")
            command = [sys.executable, "-m", "art_conformance.tracker_process", plugin_name, scenario]
            (root / "result.json").unlink(missing_ok=True)
            ended = subprocess.run(
                [*command, *map(str, paths)],
                env=environment,
                cwd=root / "seen" / "cwd",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PROCESS_LIMIT_S,
                check=False,
            )
            printed = ended.stdout.decode("utf-8", "replace")
            return Told(root, ended.returncode, printed, frozenset(secrets))

        return tell

    @pytest.fixture(scope="class")
    @classmethod
    def told(cls, tell: Callable[..., Told]) -> Told:
        return tell("told")

    @pytest.fixture(scope="class")
    @classmethod
    def kept(cls, told: Told, read_back: ReadBack) -> Mapping[ModelKey, KeptModel]:
        """What was kept of each model, read before anything else is told in that place."""
        assert told.noted
        return {key: read_back(told.folder, key.project, key.name) for key in TOLD}

    @pytest.fixture(scope="class")
    @classmethod
    def slow(cls, tell: Callable[..., Told]) -> Told:
        return tell("slow")

    @pytest.fixture(scope="class")
    @classmethod
    def broken(cls, tell: Callable[..., Told]) -> Told:
        return tell("broken")

    @pytest.fixture(scope="class")
    @classmethod
    def not_asked(cls, tell: Callable[..., Told]) -> Told:
        return tell("not asked")

    @check("TRK-001", MUST, "The plugin implements `art_log_metrics` or `art_log_trajectories`.")
    def test_listens(self, hooks: tuple[str, ...]) -> None:
        listens = {"art_log_metrics", "art_log_trajectories"} & set(hooks)
        assert listens, f"it implements {', '.join(hooks) or 'no hook'}, so model.log never reaches it"

    @check(
        "TRK-002",
        MUST,
        "Metrics are read back as they were logged, by step and by split.",
        needs=TrackerPart.METRICS,
        live=True,
    )
    def test_metrics(self, kept: Mapping[ModelKey, KeptModel]) -> None:
        _same_metrics(kept[AGENT], TOLD[AGENT])

    @check(
        "TRK-003",
        MUST,
        "A step logged twice keeps the names that were logged first; of a metric logged twice the later comes last.",
        needs=TrackerPart.METRICS,
        live=True,
    )
    def test_a_step_twice(self, kept: Mapping[ModelKey, KeptModel]) -> None:
        values = {name: value for row in kept[TWICE].rows if row.step == 1 for name, value in row.metrics.items()}
        wanted = {"loss/train": 0.5, "time/step_s": 2.0, "val/reward": 3.0}
        assert {name: values.get(name) for name in wanted} == wanted

    @check(
        "TRK-004",
        MUST,
        "NaN and the infinities are read back as such, and cost no other metric of their row.",
        needs=TrackerPart.METRICS,
        live=True,
    )
    def test_not_finite(self, kept: Mapping[ModelKey, KeptModel]) -> None:
        _same_metrics(kept[STRANGE], TOLD[STRANGE])

    @check(
        "TRK-005",
        MUST,
        "Names of metrics of any script, with spaces, quotes and dots, and of 200 characters, come back unchanged.",
        needs=TrackerPart.METRICS,
        live=True,
    )
    def test_names(self, kept: Mapping[ModelKey, KeptModel]) -> None:
        values = {name: value for row in kept[NAMED].rows for name, value in row.metrics.items()}
        assert {name: values.get(name) for name in NAMES} == NAMES

    @check(
        "TRK-006",
        MUST,
        "Of every step and split the number of trajectories and of failed rollouts is kept, however many they are.",
        needs=TrackerPart.TRAJECTORIES,
        live=True,
    )
    def test_trajectories(self, kept: Mapping[ModelKey, KeptModel]) -> None:
        for key in (AGENT, MANY):
            _same_trajectories(kept[key], TOLD[key])

    @check(
        "TRK-007",
        MUST,
        "Trajectories of any content are taken: tool calls, images, half a surrogate pair, a group without any.",
        needs=TrackerPart.TRAJECTORIES,
        live=True,
    )
    def test_any_content(self, told: Told, kept: Mapping[ModelKey, KeptModel]) -> None:
        assert not told.failures("art_log_trajectories")
        _same_trajectories(kept[ANYTHING], TOLD[ANYTHING])

    @check(
        "TRK-008",
        MUST,
        "Models that are logged at once are kept apart, also two of one name in two projects.",
        live=True,
    )
    def test_models_do_not_mix(self, kept: Mapping[ModelKey, KeptModel], declared: Collection[Capability]) -> None:
        for key in TOGETHER:
            _same(kept[key], TOLD[key], declared)

    @check("TRK-009", MUST, "A process that goes on with a model adds to what the one before it kept.", live=True)
    def test_goes_on(
        self,
        told: Told,
        kept: Mapping[ModelKey, KeptModel],
        tell: Callable[..., Told],
        read_back: ReadBack,
        declared: Collection[Capability],
    ) -> None:
        assert kept
        assert tell("afterwards", told.root).noted
        now = read_back(told.folder, GOES_ON.project, GOES_ON.name)
        _same(now, [*TOLD[GOES_ON], *AFTERWARDS[GOES_ON]], declared)

    @check(
        "TRK-010",
        MUST,
        "When nothing can be written, the program that logs goes on to its end, and other trackers hear of every step.",
        live=True,
    )
    def test_a_sink_that_fails(self, broken: Told) -> None:
        assert _heard(broken.noted) == _to_be_heard("broken")

    @check(
        "TRK-011",
        MUST,
        "When nothing can be written, that is said: by raising, a warning or a log line.",
        needs=TrackerPart.METRICS,
        live=True,
    )
    def test_a_failure_is_said(self, broken: Told) -> None:
        assert broken.printed.strip() or (broken.ended == 0 and broken.noted.warned), (
            "nothing could be written, and nobody was told"
        )

    @check(
        "TRK-012",
        MUST,
        "When what it writes to is slow, everything is kept all the same, and other trackers hear of every step.",
        live=True,
    )
    def test_a_sink_that_is_slow(self, slow: Told, read_back: ReadBack, declared: Collection[Capability]) -> None:
        assert _heard(slow.noted) == _to_be_heard("slow")
        _same(read_back(slow.folder, PATIENT.project, PATIENT.name), SHORT[PATIENT], declared)

    @check(
        "TRK-013",
        MUST,
        "No hook opens a file, a database, a connection or a process on the event loop's thread, where all would wait.",
        live=True,
    )
    def test_the_loop_goes_on(self, told: Told) -> None:
        assert not told.noted.on_loop, (
            f"on the event loop's thread it did {told.noted.on_loop[:3]}; give that to a thread of its own"
            " (`await asyncio.to_thread(...)`, or art_tracker_kit.Reporter)"
        )

    @check("TRK-014", MUST, "A cancellation that reaches a hook while it waits is passed on.", live=True)
    def test_cancelled(self, slow: Told) -> None:
        assert slow.noted.cancelled != "passed over", (
            f"a report was cancelled after {SLOW_S / 5:g} s and ended as if it had not been; never catch CancelledError"
            " (BaseException) without raising it again"
        )

    @check("TRK-015", MUST, "What it is handed is as it was afterwards: other trackers are handed the same.", live=True)
    def test_changes_nothing(self, told: Told) -> None:
        assert not told.noted.changed, f"it changed what it was handed: {told.noted.changed[:3]}"

    @check(
        "TRK-016",
        MUST,
        "A model that reports to others is not reported, its checkpoints included: nothing is written or sent.",
        live=True,
    )
    def test_not_asked(self, not_asked: Told) -> None:
        assert _heard(not_asked.noted) == _to_be_heard("not asked")
        assert not not_asked.noted.anywhere, f"nobody asked it to, and it did {not_asked.noted.anywhere[:3]}"
        assert not not_asked.files, f"nobody asked it to, and it wrote {not_asked.files[:3]}"

    @check(
        "TRK-017",
        MUST,
        "Neither loading the plugin nor a model that reports to others imports the libraries that it depends on.",
        live=True,
    )
    def test_imports_when_asked(self, not_asked: Told, entry_point: metadata.EntryPoint) -> None:
        imported = set(not_asked.noted.imported) & _libraries_of(entry_point)
        assert not imported, f"nothing was to be reported, and it imported {sorted(imported)}"

    @check(
        "TRK-018",
        MUST,
        "No secret of the environment or of the model is in what it keeps or in what it prints.",
        live=True,
    )
    def test_secrets(self, told: Told) -> None:
        assert told.noted
        for secret in told.secrets:
            found = [str(file) for file in told.files if secret.encode() in file.read_bytes()]
            assert not found, f"a key is in {found[:3]}"
            assert secret not in told.printed, "a key was printed"

    @check(
        "TRK-019",
        MUST,
        "A checkpoint that the backend keeps elsewhere, whose path is no folder of this machine, is passed over.",
        needs=TrackerPart.CHECKPOINTS,
        live=True,
    )
    def test_a_checkpoint_elsewhere(self, told: Told, kept: Mapping[ModelKey, KeptModel]) -> None:
        failed = told.failures("art_checkpoint_published")
        assert not failed, failed
        complaints = [line for line in told.printed.splitlines() if ELSEWHERE in line]
        assert not complaints, complaints
        assert kept[REMOTE] is not None


def _place(root: Path, *, broken: bool) -> Path:
    """Where a scenario may write; where it is broken, files are where folders would have to be."""
    (root / "seen" / "cwd").mkdir(parents=True)
    (root / "checkpoint").mkdir()
    (root / "checkpoint" / "adapter_config.json").write_text("{}", encoding="utf-8")
    for name in ("base", "home"):
        if broken:
            (root / "seen" / name).write_text("not a folder", encoding="utf-8")
        else:
            (root / "seen" / name).mkdir()
    return root


def _same(kept: KeptModel, reports: Iterable[Report], declared: Collection[Capability]) -> None:
    reports = list(reports)
    if TrackerPart.METRICS in declared:
        _same_metrics(kept, reports)
    if TrackerPart.TRAJECTORIES in declared:
        _same_trajectories(kept, reports)


def _same_metrics(kept: KeptModel, reports: Iterable[Report]) -> None:
    """By step, split and name, the values in the order in which they were logged. A tracker may add names."""
    splits = all(row.split is not None for row in kept.rows)
    wanted: dict[Any, list[str]] = {}
    for report in reports:
        for name, value in (report.metrics or {}).items():
            wanted.setdefault((report.step, report.split if splits else None, name), []).append(_shown(value))
    names = {name for *_, name in wanted}
    found: dict[Any, list[str]] = {}
    for row in kept.rows:
        for name in names & row.metrics.keys():
            key = (row.step, row.split if splits else None, name)
            found.setdefault(key, []).append(_shown(row.metrics[name]))
    assert found == wanted


def _shown(value: float) -> str:
    return "nan" if math.isnan(value) else repr(float(value))


def _same_trajectories(kept: KeptModel, reports: Iterable[Report]) -> None:
    wanted: dict[tuple[int, str], int] = {}
    for report in reports:
        if report.groups is not None:
            count = sum(len(group.trajectories) + len(group.exceptions) for group in report.groups)
            wanted[report.step, report.split] = wanted.get((report.step, report.split), 0) + count
    assert dict(kept.trajectories) == wanted


def _heard(noted: Noted) -> list[str]:
    return sorted(noted.heard)


def _to_be_heard(scenario: str) -> list[str]:
    return sorted(
        told(report.hook, key, report.step, report.split)
        for key, reports in SCENARIOS[scenario].items()
        for report in reports
        if report.checkpoint is None
    )


def _libraries_of(point: metadata.EntryPoint) -> set[str]:
    """The top-level modules of the distributions that the plugin's requires, ART's own left out."""
    required = [PipRequirement(line) for line in (point.dist.requires if point.dist else None) or ()]
    names = {_plain(each.name) for each in required if each.marker is None or each.marker.evaluate({"extra": ""})}
    theirs = {name for name in names if not name.startswith("art-")}
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if any(_plain(distribution) in theirs for distribution in distributions)
    }


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
