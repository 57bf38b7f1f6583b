"""A matrix as people read it: a Markdown page, and a badge in the form that badge services take.

Knows reports; runs nothing and reads no plugin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .catalogue import REVISION
from .matrix import CellReport, CellVerdict


def page(reports: Sequence[CellReport]) -> str:
    """The page: one row a cell, then the reason of each that isn't conformant, then the versions."""
    lines = [
        f"# Conformance, revision {REVISION}",
        "",
        "Made by `art-conformance matrix`. Conformant means that every MUST which applies was run and met; what could",
        "not be run is never a pass.",
        "",
        "| what | verdict | met | undeclared | SHOULD not met | time |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        unmet = sum(
            check["level"] == "SHOULD" and check["outcome"] == "NOT MET" for s in report.suites for check in s["checks"]
        )
        time = f"{report.seconds:.0f} s" if report.seconds else ""
        cells = (report.cell, report.verdict.value, report.count("met"), report.count("undeclared"), unmet, time)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reasons = [(report.cell, report.reason) for report in reports if report.reason]
    if reasons:
        lines += ["", "## Why not", ""]
        lines += [f"- **{cell}**: {reason}" for cell, reason in reasons]
    lines += ["", "## Versions", "", "| what | version |", "|---|---|"]
    versions: dict[str, str] = {}
    for report in reports:
        versions |= report.versions
    lines += [f"| {name} | {version} |" for name, version in versions.items()]
    return "\n".join(lines) + "\n"


def badge(reports: Sequence[CellReport]) -> dict[str, Any]:
    """The JSON of a badge endpoint (schema version 1): how many cells of those that could be run are conformant."""
    run = [report for report in reports if report.verdict is not CellVerdict.UNTESTABLE]
    good = sum(report.verdict is CellVerdict.CONFORMANT for report in run)
    whole = bool(run) and good == len(run)
    faults = any(report.verdict is CellVerdict.NOT_CONFORMANT for report in run)
    colour = "brightgreen" if whole else "red" if faults else "lightgrey"
    message = f"revision {REVISION}, {good} of {len(run)}"
    return {"schemaVersion": 1, "label": "ART conformance", "message": message, "color": colour}
