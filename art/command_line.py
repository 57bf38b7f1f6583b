"""The `art` command: which plugins there are, what became of each, and the commands that plugins add.

Knows the registry and nothing of what plugins do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from art_core.errors import InvalidName, did_you_mean
from art_core.loading import PluginInfo, PluginStatus
from art_core.registry import PluginRegistry, installed_plugins

from .plugin_kit import PluginKind, plan_plugin, write_plugin

cli = typer.Typer(
    name="art",
    help="ART, an agent reinforcement trainer made of plugins.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
plugins_cli = typer.Typer(help="List, check and describe plugins, and begin one.", invoke_without_command=True)
cli.add_typer(plugins_cli, name="plugins")

_COLOURS = {
    PluginStatus.ACTIVE: "green",
    PluginStatus.DISABLED: "dim",
    PluginStatus.BROKEN: "red",
    PluginStatus.INCOMPATIBLE: "red",
    PluginStatus.DUPLICATE: "red",
}


@cli.callback()
def _art() -> None:
    """ART, an agent reinforcement trainer made of plugins."""


@plugins_cli.callback()
def plugins(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """List every plugin that was found, whatever became of it."""
    if context.invoked_subcommand is not None:
        return
    infos = _registry().infos
    if as_json:
        typer.echo(json.dumps([_as_json(info) for info in infos], indent=2))
        return
    if not infos:
        typer.echo("No plugins are installed. To begin: pip install art-backend-local art-engine-torch")
        return
    print_plugins(infos)


@plugins_cli.command()
def check() -> None:
    """Say what is wrong with each plugin that isn't active, and exit with 1 if there is one."""
    infos = _registry().infos
    wrong = [info for info in infos if info.status is not PluginStatus.ACTIVE]
    for info in wrong:
        typer.echo(f"{info.name} ({info.distribution} {info.version}): {info.status.value}: {info.error}", err=True)
    summary = f"{len(infos) - len(wrong)} of {len(infos)} plugins are active."
    typer.echo(summary if infos else "No plugins are installed.", err=bool(wrong))
    raise typer.Exit(int(bool(wrong)))


@plugins_cli.command()
def show(name: Annotated[str, typer.Argument(help="The plugin's name, as `art plugins` lists it.")]) -> None:
    """Describe one plugin: what it provides, its capabilities and what they mean, the hooks it implements."""
    registry = _registry()
    infos = [info for info in registry.infos if info.name == name]
    if not infos:
        there = [info.name for info in registry.infos]
        near = did_you_mean(name, there)
        typer.echo(f"No plugin is called {name!r}.{near} Installed: {', '.join(there) or 'none'}.", err=True)
        raise typer.Exit(1)
    meanings = capability_meanings()
    for info in infos:
        typer.echo(
            f"{info.name}: {info.distribution} {info.version}, plugin API {info.api or '?'}, {info.status.value}"
        )
        if info.error:
            typer.echo(f"  {info.error}")
        for provided in info.provides:
            typer.echo(f"  provides {provided}")
            for capability in info.capabilities.get(provided, ()):
                typer.echo(f"    {capability}: {meanings.get(provided.rpartition(' ')[0], {}).get(capability, '')}")
            own_server = _own_server(registry, info, provided)
            if own_server:
                typer.echo(f"    a server of your own: {own_server}")
        if info.hooks:
            typer.echo(f"  implements {', '.join(info.hooks)}")


@plugins_cli.command()
def new(
    name: Annotated[str, typer.Argument(help="How users will ask for it: small letters, digits, hyphens.")],
    kind: Annotated[PluginKind, typer.Option(help="What it will be.")],
    directory: Annotated[
        Path | None, typer.Option(help="Where to write it; by default a folder named after the distribution, here.")
    ] = None,
) -> None:
    """Write the first version of a plugin: it installs, passes its checks, and marks the lines that are yours."""
    try:
        plugin = plan_plugin(name, kind, _registry())
        folder = directory or Path(plugin.distribution)
        written = write_plugin(plugin, folder)
    except (InvalidName, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for file in written:
        typer.echo(f"  {folder / file}")
    typer.echo(
        f"{plugin.distribution} is a working {kind.value.replace('-', ' ')} named {plugin.name!r}."
        " The lines marked '# yours' make it what you want. Next:\n\n"
        f'    cd {shlex.quote(str(folder))}\n    pip install -e ".[test]"\n    art plugins check\n    pytest'
    )


def _own_server(registry: PluginRegistry, info: PluginInfo, provided: str) -> str:
    """How a user starts a server of this inference engine, empty for everything else."""
    kind, _, name = provided.rpartition(" ")
    if kind != "inference engine" or info.status is not PluginStatus.ACTIVE:
        return ""
    return registry.inference_engine(name).own_server


def capability_meanings() -> dict[str, dict[str, str]]:
    """For each kind of plugin, what each capability means."""
    from art_core.capabilities import BackendCapability, InferenceCapability, TrainingCapability

    kinds = {
        "backend": BackendCapability,
        "inference engine": InferenceCapability,
        "training engine": TrainingCapability,
    }
    return {kind: {str(member.value): member.meaning for member in members} for kind, members in kinds.items()}


def _registry() -> PluginRegistry:
    # The table and the check say what is wrong with a plugin; the warning would say it twice.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return installed_plugins()


def _as_json(info: PluginInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "api": info.api,
        "status": info.status.value,
        "provides": list(info.provides),
        "capabilities": {name: list(values) for name, values in info.capabilities.items()},
        "hooks": list(info.hooks),
        "error": info.error,
    }


def print_plugins(infos: list[PluginInfo]) -> None:
    """Print the table of `art plugins`, and below it what is wrong with whom."""
    table = Table("plugin", "distribution", "version", "api", "status", "provides")
    for info in infos:
        status = f"[{_COLOURS[info.status]}]{info.status.value}[/]"
        api = "" if info.api is None else str(info.api)
        table.add_row(info.name, info.distribution, info.version, api, status, "\n".join(info.provides))
    console = Console()
    console.print(table)
    for info in infos:
        if info.error:
            console.print(f"{info.name} ({info.distribution}): {info.error}", markup=False, soft_wrap=True)


def main() -> None:
    """Run the `art` command with the commands of every active plugin."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name or a line of a log may hold letters that the locale's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    with _stdout_to_stderr():
        registry = _registry()
        for implementation in registry.hooks.hook.art_register_commands.get_hookimpls():
            try:
                implementation.function(*([cli] if implementation.argnames else []))
            except Exception as error:
                reason = f"its art_register_commands failed: {type(error).__name__}: {error}"
                registry.give_up(implementation.plugin_name, reason)
                typer.echo(f"plugin {implementation.plugin_name!r} is broken: {reason}", err=True)
    cli()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What plugins print while they are loaded, from Python or from a library in C, goes to stderr: stdout is the
    answer's alone.
    """
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answers = os.dup(1)
        except OSError:
            # stdout was closed by whoever started us; there is nothing to keep clean.
            yield
            return
        try:
            with contextlib.suppress(OSError):
                os.dup2(2, 1)
            yield
        finally:
            os.dup2(answers, 1)
            os.close(answers)
