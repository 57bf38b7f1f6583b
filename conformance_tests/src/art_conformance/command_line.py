"""`art-conformance`: list the requirements, check what is installed by name, run the whole matrix.

Knows its options and how outcomes are shown; what is checked and how is others'.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from art_core.errors import ArtError
from art_core.registry import PluginRegistry, installed_plugins

from .catalogue import REVISION, as_json, as_text
from .matrix import CELL_LIMIT_S, CellReport, CellVerdict, cells_at_once, kept_report, run_matrix
from .matrix_cells import Cell, cells, chosen, elsewhere
from .matrix_page import Run, badge, page

cli = typer.Typer(
    name="art-conformance",
    help="What every ART plugin, engine and backend must do, and whether those installed here do.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COLOURS = {
    CellVerdict.CONFORMANT: "green",
    CellVerdict.NOT_CONFORMANT: "bold red",
    CellVerdict.UNTESTABLE: "yellow",
    CellVerdict.INCOMPLETE: "yellow",
    CellVerdict.MACHINE: "yellow",
}
_FOLDER = Path("conformance")


@cli.command("list")
def list_requirements(
    as_json_: Annotated[bool, typer.Option("--json", help="In the form of the frozen sets.")] = False,
) -> None:
    """Print every requirement: its id, its level, and what it requires."""
    typer.echo(json.dumps(as_json(), indent=1, ensure_ascii=False) if as_json_ else as_text())


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Check installed plugins by name: --inference-engine, --training-engine, --backend or --plugin NAME.

    Whatever else is given is pytest's: `-m "not slow"` starts nothing, `-v` shows every requirement. Without a name the
    embedded defaults are checked.
    """
    # In a process of its own: pytest can't rewrite the assertions of modules that are imported already, and in a
    # project that makes its warnings errors it ends there.
    own = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"]
    raise typer.Exit(
        subprocess.run([*own, *context.args, "--pyargs", "art_conformance.by_name"], check=False).returncode
    )


@cli.command()
def matrix(
    inference_engine: Annotated[
        list[str] | None,
        typer.Option(
            help="An inference engine of the matrix; may be repeated. Default: all, or none with --tracker only."
        ),
    ] = None,
    training_engine: Annotated[
        list[str] | None,
        typer.Option(help="A training engine of the matrix; may be repeated. Default: in the same way."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="A backend of the matrix; may be repeated. Default: in the same way.")
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            help="A tracker of the matrix; may be repeated. Default: all, or none where anything else is named."
        ),
    ] = None,
    backend_args: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help="A backend's keyword arguments; {tmp} is an empty folder."),
    ] = None,
    tests: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="A test file of yours for a tracker, or a backend that needs more than arguments."
        ),
    ] = None,
    only: Annotated[str, typer.Option(help="Only cells whose name begins with this, such as 'training-'.")] = "",
    folder: Annotated[Path, typer.Option(help="Where reports are kept, and taken up again.")] = _FOLDER,
    again: Annotated[bool, typer.Option("--again", help="Run cells that have a verdict for this code too.")] = False,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="How many cells run at once. Default: what cores and free memory allow."),
    ] = None,
    limit: Annotated[float, typer.Option(help="How long one cell may take, in seconds.")] = CELL_LIMIT_S,
) -> None:
    """Hold everything that is installed against its suites: each tracker, each engine, and each backend with every pair
    of engines.

    One JSON report a cell, `matrix.md` and `badge.json` are written to the folder; the last two tell of cells left out
    by --only what an earlier run found. A run that was stopped goes on where it was. Exit status 1 when a plugin isn't
    conformant, 2 when a cell says nothing (untestable, incomplete, or a fault of the run).
    """
    registry = _registry()
    console = Console(stderr=True)
    try:
        names = chosen(registry, inference_engine or (), training_engine or (), backend or (), tracker or ())
        given = dict(_backend_args(item) for item in backend_args or ())
        files = dict(_test_file(item) for item in tests or ())
    except (ArtError, typer.BadParameter) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    all_cells = cells(names, given, files, elsewhere(registry, names.backends))
    wanted = [cell for cell in all_cells if cell.name.startswith(only)]
    if not wanted:
        typer.echo(f"No cell begins with {only!r}. There are: {', '.join(c.name for c in all_cells)}.", err=True)
        raise typer.Exit(2)

    def told(cell: Cell, report: CellReport | None) -> None:
        if report is None:
            console.print(f"{cell.name} ...", highlight=False)
            return
        style = _COLOURS[report.verdict]
        seconds = f" in {report.seconds:.0f} s" if report.seconds else ""
        words = f"{cell.name}: [{style}]{report.verdict.value}[/]{seconds}  {escape(report.reason)}"
        console.print(words.rstrip(), highlight=False)

    count = cells_at_once() if at_once is None else at_once
    began, clock = datetime.now(UTC), time.monotonic()
    reports = run_matrix(wanted, registry, folder, again=again, at_once=count, limit_s=limit, told=told)
    ran = sum(report.began is not None and report.began >= began for report in reports)
    this_run = Run(cells=ran, at_once=count, seconds=time.monotonic() - clock)
    found = {report.cell: report for report in reports}
    everything = [found.get(cell.name) or _of_earlier(cell, registry, folder) for cell in all_cells]
    (folder / "matrix.md").write_text(page(everything, this_run), encoding="utf-8")
    (folder / "badge.json").write_text(json.dumps(badge(everything)) + "\n", encoding="utf-8")
    typer.echo(
        f"{folder / 'matrix.md'} and {folder / 'badge.json'} are written, and a report of each cell beside them."
    )
    verdicts = {report.verdict for report in reports}
    if CellVerdict.NOT_CONFORMANT in verdicts:
        raise typer.Exit(1)
    raise typer.Exit(0 if verdicts == {CellVerdict.CONFORMANT} else 2)


def _of_earlier(cell: Cell, registry: PluginRegistry, folder: Path) -> CellReport:
    nothing = CellReport(
        cell=cell.name, revision=REVISION, verdict=CellVerdict.NOT_RUN, reason=cell.lacks, expected=cell.suites
    )
    return kept_report(cell, registry, folder) or nothing


def _backend_args(item: str) -> tuple[str, str]:
    name, _, value = item.partition("=")
    try:
        if not isinstance(json.loads(value), dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise typer.BadParameter(
            f"--backend-args {item}: after the backend's name and = comes a JSON object ({error})"
        ) from error
    return name, value


def _test_file(item: str) -> tuple[str, str]:
    name, _, path = item.partition("=")
    if not Path(path).is_file():
        raise typer.BadParameter(f"--tests {item}: after the name and = comes a test file, and this is none")
    return name, str(Path(path).resolve())


def _registry() -> PluginRegistry:
    # TestPlugin says what is wrong with a plugin.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return installed_plugins()


def main() -> None:
    """Run the command."""
    sys.exit(cli())
