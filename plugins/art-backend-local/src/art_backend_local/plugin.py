"""The card of the local backend and its commands, for art-core to find. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from art_core import BackendCapability, BackendSpec, hookimpl

if TYPE_CHECKING:
    import typer

art_api = 1


@hookimpl
def art_register_backends() -> Iterable[BackendSpec]:
    """The backend that serves and trains on this machine."""
    return [
        BackendSpec(
            name="local",
            factory="art_backend_local.client.backend:LocalBackend",
            summary="Serves and trains models on this machine, with checkpoints on disk.",
            capabilities=frozenset(BackendCapability) - {BackendCapability.CHECKPOINTS_AS_ARTIFACTS},
        )
    ]


@hookimpl(trylast=True)
def art_resolve_base_model(name: str) -> Path | None:
    """The folder of a model on the hub, when no other plugin knows the name."""
    from .hub_models import resolve_hub_name

    return resolve_hub_name(name)


@hookimpl
def art_register_commands(cli: typer.Typer) -> None:
    """`art ps` and `art down`."""
    from .commands import add_commands

    add_commands(cli)
