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
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Final

import psutil
from pydantic import AwareDatetime, BaseModel, ConfigDict

from art_core import PluginRegistry
from art_core.errors import ArtError
from art_runtime.devices import accelerators
from art_runtime.spawning import spawn_tethered

from .catalogue import REVISION
from .matrix_cells import Cell
from .matrix_sources import sources_of, versions_of
from .report import Outcome

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
    NOT_RUN = "not run"  #: left out of this run, and no earlier one says anything of what is installed now
    INCOMPLETE = "incomplete"  #: a suite that its kind is held against was not run
    MACHINE = "fault of the run"  #: out of time or memory, or the harness: it says nothing of the plugin


class CellReport(BaseModel):
    """What is kept of a cell: its verdict with the reason, what it is true for, and the suites' own reports. `expected`
    are the suites that it had to be held against, `sources` is the hash of the code that was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cell: str
    revision: int
    verdict: CellVerdict
    reason: str = ""
    began: AwareDatetime | None = None
    seconds: float = 0.0
    versions: dict[str, str] = {}
    sources: str = ""
    expected: tuple[str, ...] = ()
    suites: list[dict[str, Any]] = []

    def count(self, outcome: str) -> int:
        """How many checks of all suites had an outcome."""
        return sum(int(suite["counts"].get(outcome, 0)) for suite in self.suites)

    @property
    def missing(self) -> list[str]:
        """The suites that it had to be held against and of which nothing was reported."""
        return suites_missing(self.expected, self.suites)


def suites_missing(expected: Sequence[str], reported: Sequence[dict[str, Any]]) -> list[str]:
    """Those of the expected suites of which nothing was reported."""
    found = {suite["suite"] for suite in reported}
    return [name for name in expected if name not in found]


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
    """Run every cell that the folder has no outcome of for this code, all of them with `again`, `at_once` at a time.
    Gives the reports in the order of the cells.

    `told` hears of a cell twice, never of two at the same time: when it begins, with None, and when it has ended. A
    cell without verdict on the plugin (untestable, incomplete, or a fault of the run) is tried anew.
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
    report = CellReport(
        cell=cell.name, revision=REVISION, verdict=CellVerdict.UNTESTABLE, reason=cell.lacks, expected=cell.suites
    )
    if cell.lacks:
        return report
    try:
        versions, sources = versions_of(cell, registry), sources_of(cell, registry)
    except ArtError as missing:
        return report.model_copy(update={"reason": str(missing)})
    log = folder.resolve() / f"{cell.name}.log"
    began, clock = datetime.now(UTC), time.monotonic()
    # What plugins leave where they run goes with the folder, and no project's own settings of pytest rule there.
    with tempfile.TemporaryDirectory(prefix="art-conformance-", ignore_cleanup_errors=True) as empty:
        outcomes, ini = Path(empty) / "outcomes.json", Path(empty) / "pytest.ini"
        ini.write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n", encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ini)]
        command += ["--rootdir", empty, "--confcutdir", str(folder.resolve()), "--conformance-report", str(outcomes)]
        log.unlink(missing_ok=True)
        ended = _ended([*command, *pytest_options, *cell.arguments], Path(empty), log, limit_s, stopped)
        seconds = time.monotonic() - clock
        suites = json.loads(outcomes.read_text(encoding="utf-8")) if outcomes.exists() else []
    verdict, reason = _judged(cell, ended, suites, limit_s, log)
    return report.model_copy(
        update={
            "verdict": verdict,
            "reason": reason,
            "began": began,
            "seconds": seconds,
            "versions": versions,
            "sources": sources,
            "suites": suites,
        }
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


def _judged(
    cell: Cell, ended: int | None, suites: Sequence[dict[str, Any]], limit_s: float, log: Path
) -> tuple[CellVerdict, str]:
    if ended is None:
        return CellVerdict.MACHINE, f"it had not ended after {limit_s:.0f} s; see {log.name}"
    if ended < 0:
        return (
            CellVerdict.MACHINE,
            f"it was ended by {signal.Signals(-ended).name}, as by a lack of memory; see {log.name}",
        )
    if ended in _ENDINGS or not suites:
        return CellVerdict.MACHINE, f"{_ENDINGS.get(ended, 'nothing was reported')}; see {log.name}"
    failed = _with(suites, Outcome.NOT_MET, only_must=True)
    for outcome in (Outcome.KNOWN_FAILURE, Outcome.UNEXPECTED_PASS):
        failed += [f"{said} ({outcome.value})" for said in _with(suites, outcome)]
    if failed:
        return CellVerdict.NOT_CONFORMANT, "; ".join(failed)
    if faults := _with(suites, Outcome.MACHINE):
        return CellVerdict.MACHINE, "; ".join(faults)
    if untestable := _with(suites, Outcome.UNTESTABLE):
        return CellVerdict.UNTESTABLE, "; ".join(untestable)
    if missing := suites_missing(cell.suites, suites):
        where = Path(cell.tests).name or log.name
        return CellVerdict.INCOMPLETE, f"{' and '.join(missing)} was not run: {where} has no class of it"
    unfinished = [suite["subject"] for suite in suites if not suite["conformant"]]
    if unfinished or ended:
        return CellVerdict.MACHINE, f"not every MUST was run; see {log.name}"
    return CellVerdict.CONFORMANT, ""


def _with(suites: Sequence[dict[str, Any]], outcome: Outcome, *, only_must: bool = False) -> list[str]:
    """The ids of the checks with an outcome, each with what is said of it; those of which the same is said together."""
    ids: dict[str, list[str]] = {}
    for check in (check for suite in suites for check in suite["checks"]):
        if check["outcome"] == outcome.value and (check["level"] == "MUST" or not only_must):
            ids.setdefault(check["detail"], []).append(check["id"])
    return [f"{', '.join(found)} {detail}".strip() for detail, found in ids.items()]


def kept_report(cell: Cell, registry: PluginRegistry, folder: Path) -> CellReport | None:
    """What the folder has of a cell, when it is a verdict for what is installed now, code and versions alike."""
    try:
        report = CellReport.model_validate_json((folder / f"{cell.name}.json").read_bytes())
        now = (REVISION, cell.suites, versions_of(cell, registry), sources_of(cell, registry))
    except (OSError, ValueError, ArtError):
        return None
    says_something = report.verdict in (CellVerdict.CONFORMANT, CellVerdict.NOT_CONFORMANT)
    true_for = (report.revision, report.expected, report.versions, report.sources)
    return report if says_something and true_for == now else None


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
