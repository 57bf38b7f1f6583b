"""`art engines`: list the engines and their environments; install, examine and remove an environment."""

from __future__ import annotations

from typing import Annotated, NoReturn, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from art_core import ArtError, installed_plugins
from art_core.errors import did_you_mean
from art_engine_kit.environment import Flavour

from .environments import (
    EngineSpec,
    EnvironmentMissing,
    engine_folder,
    environment_for,
    environment_spec,
    first_met,
    machine_flavour,
)

FlavourOption = Annotated[
    str | None, typer.Option("--flavour", help="cpu or cuda. Left out: cuda where there is a GPU, else cpu.")
]
NameArgument = Annotated[str, typer.Argument(help="The engine's name, as `art engines list` shows it.")]


def add_commands(cli: typer.Typer) -> None:
    """Add `art engines` to the `art` command."""
    engines = typer.Typer(help="Engines and the environments that they run in.", no_args_is_help=True)
    engines.command("list")(list_engines)
    engines.command("install")(install_engine)
    engines.command("doctor")(examine_engine)
    engines.command("remove")(remove_engine)
    cli.add_typer(engines, name="engines")


def list_engines() -> None:
    """List every engine, and where it runs."""
    table = Table("engine", "for", "runs in", "versions")
    for name, (spec, roles) in _engines().items():
        where, versions = _state(spec)
        table.add_row(name, " and ".join(roles), where, versions)
    Console().print(table)


def install_engine(
    name: NameArgument,
    flavour: FlavourOption = None,
    again: Annotated[bool, typer.Option("--again", help="Make it anew, even if it is there.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Ask the index what would be installed, and install nothing. Needs no GPU."),
    ] = False,
) -> None:
    """Make the environment that an engine runs in."""
    from .environments.install import install
    from .environments.resolution import resolve

    spec = _engine(name)
    try:
        environment = environment_spec(spec)
        here = first_met(environment.provided_by) if environment is not None else "everything it needs"
        if here is not None and flavour is None and not again and not dry_run:
            typer.echo(f"Nothing to do: this environment holds {here}, so engine {name} runs in it.")
            return
        wanted = environment_for(spec, _flavour(flavour))
        if dry_run:
            packages = resolve(wanted)
            typer.echo("\n".join(packages))
            typer.echo(
                f"{name} ({wanted.flavour}): {len(packages)} packages, none installed; into {wanted.folder}", err=True
            )
            return
        there = wanted.python() is not None
        python = install(wanted, again=again)
        typer.echo(f"{'It is installed already' if there and not again else 'Ready'}: {python}")
    except ArtError as error:
        _give_up(str(error))


def examine_engine(
    name: NameArgument,
    flavour: FlavourOption = None,
    python: Annotated[str | None, typer.Option(help="Examine this interpreter instead.")] = None,
) -> None:
    """Run an engine's interpreter, print versions and say what is wrong; exit with 1 if something is."""
    from .environments.doctor import examine

    spec = _engine(name)
    try:
        found = examine(spec, python=python, flavour=_flavour(flavour))
    except ArtError as error:
        _give_up(str(error))
    typer.echo(f"{name} ({found.flavour}): {found.python.path}\n  {found.python.why}")
    typer.echo("  " + ", ".join(f"{distribution} {version}" for distribution, version in found.versions.items()))
    if found.problem:
        _give_up(f"{found.problem}\nTo make its environment anew: art engines install {name} --again")
    typer.echo("  it works")


def remove_engine(name: NameArgument, flavour: FlavourOption = None) -> None:
    """Remove an engine's environments, of all flavours unless one is given."""
    from .environments.install import remove

    if not engine_folder(name).is_dir():
        _engine(name)
    removed = remove(name, _flavour(flavour))
    typer.echo("\n".join(f"removed {folder}" for folder in removed) or f"Engine {name} has no environment to remove.")


def _engines() -> dict[str, tuple[EngineSpec, list[str]]]:
    registry = installed_plugins()
    found: dict[str, tuple[EngineSpec, list[str]]] = {}
    for name in registry.provided("inference engine"):
        found[name] = (registry.inference_engine(name), ["inference"])
    for name in registry.provided("training engine"):
        spec = registry.training_engine(name)
        if name in found:
            found[name][1].append("training")
        else:
            found[name] = (spec, ["training"])
    return dict(sorted(found.items()))


def _engine(name: str) -> EngineSpec:
    engines = _engines()
    if name not in engines:
        _give_up(
            f"No engine is called {name!r}.{did_you_mean(name, engines)} Installed: {', '.join(engines) or 'none'}."
            f" An engine comes with its plugin, such as: pip install art-engine-{name}"
        )
    return engines[name][0]


def _state(spec: EngineSpec) -> tuple[str, str]:
    try:
        environment = environment_spec(spec)
        if environment is None:
            return "this environment", ""
        here = first_met(environment.provided_by)
        if here is not None:
            return "this environment", here
        rows = [environment_for(spec, flavour) for flavour in environment.flavours]
    except (ArtError, EnvironmentMissing) as error:
        return f"[red]{error}[/]", ""
    installed = [row for row in rows if row.python() is not None]
    if not installed:
        return f"not installed: art engines install {spec.name}", ""
    folders = [
        f"its own, {row.flavour}{'' if row.flavour == machine_flavour() else ' (not this machine)'}"
        for row in installed
    ]
    versions = [", ".join(f"{k} {v}" for k, v in row.facts().get("versions", {}).items()) for row in installed]
    return "\n".join(folders), "\n".join(versions)


def _flavour(text: str | None) -> Flavour | None:
    if text is not None and text not in get_args(Flavour):
        _give_up(f"--flavour {text!r} is unknown.{did_you_mean(text, get_args(Flavour))} It is cpu or cuda.")
    return cast("Flavour | None", text)


def _give_up(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
