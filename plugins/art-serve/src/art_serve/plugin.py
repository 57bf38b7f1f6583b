"""The `art serve` command, for art-core to find. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from art_core import hookimpl

if TYPE_CHECKING:
    import typer

art_api = 1


@hookimpl
def art_register_commands(cli: typer.Typer) -> None:
    """`art serve` and `art serve keys`."""
    from .commands import add_commands

    add_commands(cli)
