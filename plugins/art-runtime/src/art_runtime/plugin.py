"""What art-runtime registers: the commands `art engines` and `art doctor`. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from art_core import hookimpl

if TYPE_CHECKING:
    import typer

art_api = 1


@hookimpl
def art_register_commands(cli: typer.Typer) -> None:
    """`art engines list | install | doctor | remove`, and `art doctor`."""
    from .doctor.command import doctor
    from .engine_cli import add_commands

    add_commands(cli)
    cli.command()(doctor)
