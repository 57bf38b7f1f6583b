"""The process that tells a tracker a scenario, and notes what the tracker did meanwhile.

Knows hooks and Python's audit events, and no tracker. What is made of what it notes is the suite's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from art_core import CheckpointRef, ModelKey, PluginRegistry, PublicationReceipt, announce, hookimpl
from art_core.loading import ENTRY_POINT_GROUP

from .tracker_reports import LISTENER, PATIENT, SCENARIOS, SECRET, SHORT, Report

SLOW_S = 0.3
#: So many writes are slow; a library that makes hundreds for a row is not to take minutes.
SLOW_WRITES = 12
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
_AUDITED = {"sqlite3.connect", "socket.connect", "subprocess.Popen", "os.mkdir", "os.rename"}


@dataclass(frozen=True)
class TrackedModel:
    """What a tracker is handed as the model, with a key that isn't to be found in what it keeps."""

    name: str
    project: str
    base_path: str
    report_metrics: list[str] | None = None
    entity: str | None = None
    base_model: str = "tiny"
    inference_api_key: str = SECRET
    internal_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Noted:
    """What a process saw of a tracker. `on_loop` and `anywhere` are audit events with what they were for."""

    heard: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    on_loop: list[str] = field(default_factory=list)
    anywhere: list[str] = field(default_factory=list)
    imported: list[str] = field(default_factory=list)
    cancelled: str = ""


class _Watch:
    """Notes what is opened, and makes it slow where that is asked for."""

    def __init__(self, noted: Noted, slow: bool) -> None:
        self._noted, self._on, self._lock = noted, False, threading.Lock()
        self._slow = SLOW_WRITES if slow else 0
        sys.addaudithook(self._event)

    def begin(self) -> None:
        self._on = True

    def end(self) -> None:
        self._on = False

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on or (event not in _AUDITED and event != "open"):
            return
        if event == "open" and (
            isinstance(arguments[0], int) or not arguments[2] & _WRITES or arguments[0] == os.devnull
        ):
            return
        what = f"{event} {arguments[1] if event == 'socket.connect' else arguments[0]}"
        self._noted.anywhere.append(what)
        if threading.current_thread() is threading.main_thread():
            self._noted.on_loop.append(what)
            return
        with self._lock:
            self._slow, slow = self._slow - 1, self._slow > 0
        if slow:
            time.sleep(SLOW_S)


class _Listener:
    """Another tracker."""

    art_api = 1

    def __init__(self, heard: list[str]) -> None:
        self._heard = heard

    @hookimpl
    def art_log_metrics(self, model: Any, step: int, split: str) -> None:
        self._heard.append(told("art_log_metrics", ModelKey(model.project, model.name), step, split))

    @hookimpl
    def art_log_trajectories(self, model: Any, step: int, split: str) -> None:
        self._heard.append(told("art_log_trajectories", ModelKey(model.project, model.name), step, split))


def told(hook: str, key: ModelKey, step: int, split: str) -> str:
    """A line for one call of a hook."""
    return f"{hook} {key} {step} {split}"


async def _tell(
    registry: PluginRegistry, model: TrackedModel, report: Report, checkpoint: Path, only: list[str] | None
) -> None:
    if report.metrics is not None:
        said: dict[str, Any] = {"metrics": dict(report.metrics), "step": report.step, "split": report.split}
    elif report.groups is not None:
        said = {"trajectory_groups": list(report.groups), "step": report.step, "split": report.split}
    else:
        key = ModelKey(model.project, model.name)
        path = Path(report.checkpoint) if report.checkpoint else checkpoint
        receipt = PublicationReceipt(model=key, step=report.step, inference_name=f"{key.name}@{report.step}")
        said = {"checkpoint": CheckpointRef(key, report.step, path), "receipt": receipt}
        only = None  # as a backend announces it: to all
    before = repr(said)
    await announce(registry, report.hook, only=only, model=model, **said)
    if repr(said) != before:
        raise _Changed(report.hook)


class _Changed(Exception):
    """A tracker changed what it was handed."""


async def _all(registry: PluginRegistry, scenario: str, folder: Path, checkpoint: Path, noted: Noted) -> None:
    """Every model at once, the reports of each in order."""
    reports = SCENARIOS[scenario]
    only = [LISTENER] if scenario == "not asked" else None

    async def one(key: ModelKey) -> None:
        model = TrackedModel(key.name, key.project, str(folder), only)
        for report in reports[key]:
            try:
                await _tell(registry, model, report, checkpoint, only)
            except _Changed as changed:
                noted.changed.append(f"{changed} {key} {report.step}")

    if scenario == "slow":
        noted.cancelled = await _cancelled_report(registry, folder)
        noted.heard.clear()
    await asyncio.gather(*map(one, reports))


async def _cancelled_report(registry: PluginRegistry, folder: Path) -> str:
    """What became of a report that is cancelled while it is written: "cancelled", "done" or "passed over"."""
    model = TrackedModel("cancelled", "shop", str(folder))
    task = asyncio.create_task(_tell(registry, model, SHORT[PATIENT][0], folder, None))
    await asyncio.sleep(SLOW_S / 5)
    if not task.cancel():
        return "done"
    await asyncio.wait([task])
    return "cancelled" if task.cancelled() else "passed over"


def main(plugin: str, scenario: str, folder: Path, checkpoint: Path, result: Path) -> None:
    """Tell `plugin` the scenario, with `folder` for the models' files, and write what was seen to `result`."""
    noted = Noted()
    there = set(sys.modules)
    watch = _Watch(noted, scenario == "slow")
    registry = PluginRegistry()
    # Not every plugin of the environment: what they import would be taken for this one's.
    registry.load(point for point in metadata.entry_points(group=ENTRY_POINT_GROUP) if point.name == plugin)
    registry.register(_Listener(noted.heard), LISTENER)
    watch.begin()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(_all(registry, scenario, folder, checkpoint, noted))
    watch.end()
    noted.warned = [str(each.message) for each in caught]
    noted.imported = sorted({name.partition(".")[0] for name in set(sys.modules) - there})
    result.write_text(json.dumps(asdict(noted)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(Path, sys.argv[3:6]))
