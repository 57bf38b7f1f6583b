"""Runs the cells of a matrix, several at once where they fit, keeps a report of each in a folder, and takes up where it
was stopped.

Knows how pytest is started and what its end means. A fault of the machine (out of time, killed, no test at all) is
never a plugin's failure, and what could not be run is never a pass.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any, Final

import psutil
from pydantic import BaseModel, ConfigDict

from art_core import PluginRegistry
from art_core.errors import ArtError
from art_runtime.devices import accelerators
from art_runtime.spawning import spawn_tethered

from .catalogue import REVISION
from .matrix_cells import Cell, versions_of

CELL_LIMIT_S: Final = 1800.0
#: What the processes of a cell hold at most, with two inference servers of the larger engines.
CELL_BYTES: Final = 8 * 2**30
_LOOK_EVERY_S: Final = 0.5
_ENDINGS: Final = {
    2: "it was interrupted",
    3: "pytest itself failed",
    4: "pytest was called wrongly",
    5: "no check was found",
}


class CellVerdict(Enum):
    """What became of a cell."""

    CONFORMANT = "conformant"
    NOT_CONFORMANT = "NOT conformant"
    UNTESTABLE = "untestable"  #: something that it needs isn't here
    MACHINE = "fault of the run"  #: out of time or memory, or the harness: it says nothing of the plugin


class CellReport(BaseModel):
    """What is kept of a cell: its verdict with the reason, what it is true for, and the suites' own reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cell: str
    revision: int
    verdict: CellVerdict
    reason: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = {}
    suites: list[dict[str, Any]] = []

    def count(self, outcome: str) -> int:
        """How many checks of all suites had an outcome."""
        return sum(int(suite["counts"].get(outcome, 0)) for suite in self.suites)


def _told_nobody(_cell: Cell, _report: CellReport | None) -> None:
    return


def cells_at_once() -> int:
    """How many cells this machine runs at once: as many as it has cores and free memory for, and one where they would
    share a GPU.
    """
    if accelerators():
        return 1
    return max(1, min(os.cpu_count() or 1, psutil.virtual_memory().available // CELL_BYTES))


def run_matrix(
    cells: Sequence[Cell],
    registry: PluginRegistry,
    folder: Path,
    *,
    again: bool = False,
    at_once: int = 1,
    limit_s: float = CELL_LIMIT_S,
    pytest_options: Sequence[str] = (),
    told: Callable[[Cell, CellReport | None], None] = _told_nobody,
) -> list[CellReport]:
    """Run every cell that the folder has no outcome of for these versions, all of them with `again`, `at_once` at a
    time. Gives the reports in the order of the cells.

    `told` hears of a cell twice, never of two at the same time: when it begins, with None, and when it has ended. A
    cell without verdict on the plugin (untestable, or a fault of the run) is tried anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    telling, stopped = threading.Lock(), threading.Event()

    def tell(cell: Cell, report: CellReport | None) -> None:
        with telling:
            told(cell, report)

    def run(cell: Cell) -> CellReport | None:
        if stopped.is_set():
            return None
        tell(cell, None)
        report = None if again else kept_report(cell, registry, folder)
        if report is None:
            report = run_cell(
                cell, registry, folder, limit_s=limit_s, pytest_options=pytest_options, stopped=stopped.is_set
            )
            if stopped.is_set():
                return None
            _write(folder / f"{cell.name}.json", report.model_dump_json(indent=1) + "\n")
        tell(cell, report)
        return report

    with ThreadPoolExecutor(at_once, thread_name_prefix="cell") as threads:
        try:
            return [report for report in threads.map(run, cells) if report is not None]
        except BaseException:
            stopped.set()
            raise


def run_cell(
    cell: Cell,
    registry: PluginRegistry,
    folder: Path,
    *,
    limit_s: float = CELL_LIMIT_S,
    pytest_options: Sequence[str] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> CellReport:
    """Run one cell in a process of its own, whose output is kept as `NAME.log`, unless and until it is `stopped`."""
    if cell.lacks:
        return CellReport(cell=cell.name, revision=REVISION, verdict=CellVerdict.UNTESTABLE, reason=cell.lacks)
    try:
        versions = versions_of(cell, registry)
    except ArtError as missing:
        return CellReport(cell=cell.name, revision=REVISION, verdict=CellVerdict.UNTESTABLE, reason=str(missing))
    outcomes, ini = folder / f".{cell.name}-outcomes.json", folder / f".{cell.name}.ini"
    outcomes.unlink(missing_ok=True)
    log = folder / f"{cell.name}.log"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--conformance-report",
        str(outcomes.resolve()),
    ]
    # From an empty folder, so that no project's own settings of pytest rule.
    _write(ini, "[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    command += ["-c", str(ini.resolve()), "--rootdir", str(folder.resolve()), *pytest_options, *cell.arguments]
    began = time.monotonic()
    try:
        log.unlink(missing_ok=True)
        ended = _ended(command, folder, log, limit_s, stopped)
        seconds = time.monotonic() - began
        suites = json.loads(outcomes.read_text(encoding="utf-8")) if outcomes.exists() else []
    finally:
        outcomes.unlink(missing_ok=True)
        ini.unlink(missing_ok=True)
    verdict, reason = _judged(ended, suites, limit_s, log)
    return CellReport(
        cell=cell.name,
        revision=REVISION,
        verdict=verdict,
        reason=reason,
        seconds=seconds,
        versions=versions,
        suites=suites,
    )


def _ended(command: Sequence[str], folder: Path, log: Path, limit_s: float, stopped: Callable[[], bool]) -> int | None:
    """Its exit status, None when it ran out of time. It ends with this process, and all that it started with it."""
    child = spawn_tethered(command, log_file=log, cwd=folder, stop_timeout_s=20.0)
    deadline = time.monotonic() + limit_s
    try:
        while (left_s := deadline - time.monotonic()) > 0 and not stopped():
            try:
                return child.wait(min(left_s, _LOOK_EVERY_S))
            except TimeoutError:
                continue
        return None
    finally:
        child.stop()


def _judged(ended: int | None, suites: Sequence[dict[str, Any]], limit_s: float, log: Path) -> tuple[CellVerdict, str]:
    if ended is None:
        return CellVerdict.MACHINE, f"it had not ended after {limit_s:.0f} s; see {log.name}"
    if ended < 0:
        return (
            CellVerdict.MACHINE,
            f"it was ended by {signal.Signals(-ended).name}, as by a lack of memory; see {log.name}",
        )
    if ended in _ENDINGS or not suites:
        return CellVerdict.MACHINE, f"{_ENDINGS.get(ended, 'nothing was reported')}; see {log.name}"
    failed = [
        f"{check['id']} {check['detail']}".strip()
        for suite in suites
        for check in suite["checks"]
        if check["level"] == "MUST" and check["outcome"] in ("NOT MET", "known failure")
    ]
    if failed:
        return CellVerdict.NOT_CONFORMANT, "; ".join(failed)
    unfinished = [suite["subject"] for suite in suites if not suite["conformant"]]
    if unfinished or ended:
        return CellVerdict.MACHINE, f"not every MUST was run; see {log.name}"
    return CellVerdict.CONFORMANT, ""


def kept_report(cell: Cell, registry: PluginRegistry, folder: Path) -> CellReport | None:
    """What the folder has of a cell, when it is a verdict for what is installed now."""
    try:
        report = CellReport.model_validate_json((folder / f"{cell.name}.json").read_bytes())
        versions = versions_of(cell, registry)
    except (OSError, ValueError, ArtError):
        return None
    says_something = report.verdict in (CellVerdict.CONFORMANT, CellVerdict.NOT_CONFORMANT)
    return report if says_something and (report.revision, report.versions) == (REVISION, versions) else None


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
