"""Writes docs/foreign-engines.md of the reports that are kept in docs/conformance/foreign; `--check` compares only.

The reports come from `test_foreign_engines`, told by ART_KEEP_REPORTS to keep them. `make foreign-engines` does both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from art_conformance.matrix import CellReport

ROOT: Final = Path(__file__).parents[2]
REPORTS: Final = ROOT / "docs" / "conformance" / "foreign"
PAGE: Final = ROOT / "docs" / "foreign-engines.md"
INTRODUCTION: Final = """\
# Two engines of a third party

Made with `art plugins new NAME --kind inference-engine`, installed from wheels into an environment outside the
checkout, and held against the conformance suite with their real servers. `make foreign-engines` does it again and
writes this page. What each can't do, and why, stands in its README:
[llamacpp](../examples/foreign_engines/art-engine-llamacpp/README.md), whose server takes adapters at its start only,
and [transformers](../examples/foreign_engines/art-engine-transformers/README.md), whose server is unfit and must be
told apart.
"""


def kept() -> list[CellReport]:
    """The reports that are kept, by name."""
    return [CellReport.model_validate_json(file.read_bytes()) for file in sorted(REPORTS.glob("inference-*.json"))]


def unmet(report: CellReport) -> list[dict[str, Any]]:
    """The MUSTs that were run and not met, known failures among them."""
    failed = ("NOT MET", "known failure")
    checks = [check for suite in report.suites for check in suite["checks"]]
    return [check for check in checks if check["level"] == "MUST" and check["outcome"] in failed]


def undeclared(report: CellReport) -> list[str]:
    """The capabilities that it doesn't declare and that a check would ask for."""
    checks = [check for suite in report.suites for check in suite["checks"]]
    return sorted({check["needs"] for check in checks if check["outcome"] == "undeclared"})


def page_of(reports: Sequence[CellReport]) -> str:
    """The page: a row an engine, then the versions of each and every MUST that it doesn't meet, with what was seen."""
    lines = [
        INTRODUCTION,
        "| engine | verdict | met | MUSTs not met | not declared | time |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        name, verdict = report.cell.removeprefix("inference-"), f"{report.verdict.value} to revision {report.revision}"
        absent = ", ".join(f"`{capability}`" for capability in undeclared(report))
        row = (name, verdict, report.count("met"), len(unmet(report)), absent, f"{report.seconds:.0f} s")
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "What isn't declared is refused in words, which a check of its own holds (INF-016)."]
    for report in reports:
        name = report.cell.removeprefix("inference-")
        lines += [
            "",
            f"## {name}",
            "",
            ", ".join(f"{what} {version}" for what, version in report.versions.items()) + ".",
        ]
        if unmet(report):
            lines += ["", "| MUST | requirement | what was seen |", "|---|---|---|"]
        lines += [f"| {c['id']} | {c['requirement']} | {_cell(c['detail'])} |" for c in unmet(report)]
    return "\n".join(lines) + "\n"


def _cell(detail: str) -> str:
    said = detail.removeprefix("AssertionError: ").removeprefix("art_core.errors.EngineRefused: ")
    return f"`{said.replace('|', '/').replace('`', chr(39))}`"


def main() -> None:
    """Write the page, or with `--check` end with 1 where it isn't what the reports give."""
    made = page_of(kept())
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != made:
        sys.exit("docs/foreign-engines.md is not what its reports give. Run: make foreign-engines")


if __name__ == "__main__":
    main()
