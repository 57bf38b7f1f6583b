"""`art doctor`: prints what was found, what is wrong last, and ends with 1 if something is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from .examination import examine_all
from .finding import Finding, State

_COLOURS = {State.OK: "green", State.NOTE: "yellow", State.WRONG: "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead.")] = False,
) -> None:
    """Look at this machine, environment and folder; say what is wrong, with the line that mends it."""
    found = examine_all()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        console = Console()
        for finding in found:
            _print(console, finding)
        console.print(_summary(found), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(int(any(finding.state is State.WRONG for finding in found)))


def _print(console: Console, finding: Finding) -> None:
    console.print(f"[{_COLOURS[finding.state]}]{finding.state:5}[/] ", end="", highlight=False)
    console.print(f"{finding.about}: {finding.says}", markup=False, highlight=False, soft_wrap=True)
    if finding.mend:
        console.print(f"        → {finding.mend}", markup=False, highlight=False, soft_wrap=True)


def _summary(found: list[Finding]) -> str:
    wrong = sum(finding.state is State.WRONG for finding in found)
    notes = sum(finding.state is State.NOTE for finding in found)
    words = "Nothing is wrong" if not wrong else f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong"
    return f"{words}, {notes} to note. Whether an engine really runs: art engines doctor NAME"
