"""A matrix as people read it: a Markdown page, and a badge in the form that badge services take.

Knows reports; runs nothing and reads no plugin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .catalogue import REVISION
from .matrix import CellReport, CellVerdict
from .matrix_cells import of_the_default


@dataclass(frozen=True)
class Run:
    """How long the last run took from its start to its end: of how many cells, and how many of them at a time."""

    cells: int
    at_once: int
    seconds: float


def page(reports: Sequence[CellReport], run: Run) -> str:
    """The page: one row a cell, then the reason of each that isn't conformant, then times and versions."""
    lines = [
        f"# Conformance, revision {REVISION}",
        "",
        "Made by `art-conformance matrix`. Conformant means that of every suite for its kind each MUST that applies",
        "was run and met, and nothing is listed as a known failure; what could not be run is never a pass.",
        "",
        "| what | verdict | suites | met | undeclared | SHOULD not met | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        unmet = sum(
            check["level"] == "SHOULD" and check["outcome"] == "NOT MET" for s in report.suites for check in s["checks"]
        )
        time = f"{report.seconds:.0f} s" if report.seconds else ""
        met, undeclared = report.count("met"), report.count("undeclared")
        cells = (report.cell, report.verdict.value, _suites(report), met, undeclared, unmet, time)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reasons = [(report.cell, report.reason) for report in reports if report.reason]
    if reasons:
        lines += ["", "## Why not", ""]
        lines += [f"- **{cell}**: {reason}" for cell, reason in reasons]
    lines += ["", "## Time", "", *_times(reports, run)]
    lines += ["", "## Versions", "", "| what | version |", "|---|---|"]
    versions: dict[str, str] = {}
    for report in reports:
        versions |= report.versions
    lines += [f"| {name} | {version} |" for name, version in versions.items()]
    return "\n".join(lines) + "\n"


def badge(reports: Sequence[CellReport]) -> dict[str, Any]:
    """The JSON of a badge endpoint (schema version 1): how many cells of all are conformant, those among them that
    couldn't be or weren't run. It is green only when all are.
    """
    good = sum(report.verdict is CellVerdict.CONFORMANT for report in reports)
    whole = bool(reports) and good == len(reports)
    faults = any(report.verdict is CellVerdict.NOT_CONFORMANT for report in reports)
    colour = "brightgreen" if whole else "red" if faults else "lightgrey"
    message = f"revision {REVISION}, {good} of {len(reports)}"
    return {"schemaVersion": 1, "label": "ART conformance", "message": message, "color": colour}


def _suites(report: CellReport) -> str:
    ran = dict.fromkeys(suite["suite"] for suite in report.suites)
    words = [", ".join(map(_short, ran))] if ran else []
    if report.missing:
        words.append(f"not run: {', '.join(map(_short, report.missing))}")
    return "; ".join(words)


def _short(suite: str) -> str:
    return suite.removesuffix("Conformance")


def _times(reports: Sequence[CellReport], run: Run) -> list[str]:
    default = [report for report in reports if report.seconds and of_the_default(report.cell)]
    return [
        f"- all cells, one after another: {sum(report.seconds for report in reports):.0f} s",
        f"- of these the embedded default ({', '.join(report.cell for report in default) or 'none of its cells'}):"
        f" {sum(report.seconds for report in default):.0f} s",
        f"- the last run, from its start to its end: {run.seconds:.0f} s for {run.cells} of {len(reports)} cells,"
        f" {run.at_once} at a time; of the others it is told what an earlier run found",
    ]
