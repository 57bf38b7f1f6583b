"""`art serve` and `art serve keys`: a command line becomes settings. The server is imported when it starts."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sqlalchemy import Engine


serve_cli = typer.Typer(
    help="Train and serve models for clients elsewhere, over the wire of art-backend-serverless.",
    invoke_without_command=True,
)
keys_cli = typer.Typer(help="Make, list and revoke the keys by which clients come in.", no_args_is_help=True)
serve_cli.add_typer(keys_cli, name="keys")

_Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="ART_SERVE_DATA",
        help="The folder of all that is kept. [default: ~/.local/share/art-serve]",
    ),
]
_Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="ART_SERVE_DATABASE",
        show_envvar=True,
        help="A SQLite file, or postgresql://… (a password belongs in the variable). [default: state.sqlite in --data]",
    ),
]


def add_commands(cli: typer.Typer) -> None:
    """Add them to the `art` command."""
    cli.add_typer(serve_cli, name="serve")


@serve_cli.callback()
def serve(
    context: typer.Context,
    backend: Annotated[str, typer.Option(help="The installed backend that trains and serves.")] = "local",
    base_model: Annotated[
        list[str] | None,
        typer.Option(help="A base model that clients may name, or NAME=FOLDER; repeat it. Without: any of the hub."),
    ] = None,
    inference_engine: Annotated[str | None, typer.Option(help="Passed on to the backend.")] = None,
    training_engine: Annotated[str | None, typer.Option(help="Passed on to the backend.")] = None,
    backend_option: Annotated[
        list[str] | None, typer.Option(help="Another keyword argument of the backend, NAME=VALUE, VALUE being JSON.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine once a key was made.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8484,
    database: _Database = None,
    data: _Data = None,
    certificate: Annotated[Path | None, typer.Option(help="For TLS: the file of the certificate chain.")] = None,
    key: Annotated[Path | None, typer.Option(help="For TLS: the file of the certificate's private key.")] = None,
    waiting_jobs: Annotated[int, typer.Option(min=1, help="Jobs of one entity that may wait.")] = 64,
    requests_per_s: Annotated[float, typer.Option(min=1, help="How often one entity may ask, in the long run.")] = 500,
    job_mib: Annotated[int, typer.Option(min=1, help="The largest training job that is taken, in MiB.")] = 256,
) -> None:
    """Serve until told to end. `art serve keys create ENTITY` makes the first key."""
    if context.invoked_subcommand is not None:
        return
    from art_core import ArtError

    from .base_models import BaseModels
    from .request_bodies import BodyLimits
    from .request_log import JsonLines
    from .server import CannotServe, ServeSettings
    from .server import serve as run
    from .service import Limits

    if (certificate is None) != (key is None):
        _fail("give --certificate and --key together")
    try:
        options = dict(_option(each) for each in backend_option or ())
        options |= {
            name: value
            for name, value in (("inference_engine", inference_engine), ("training_engine", training_engine))
            if value is not None
        }
        settings = ServeSettings(
            data=_data_folder(data),
            database=database,
            backend=backend,
            backend_options=options,
            base_models=BaseModels.of(base_model or ()),
            host=host,
            port=port,
            certificate=certificate,
            key=key,
            limits=Limits(
                bodies=BodyLimits(job=job_mib * 2**20),
                waiting_jobs=waiting_jobs,
                requests_per_s=requests_per_s,
                requests_at_once=4 * requests_per_s,
            ),
        )
        lines = logging.StreamHandler(sys.stderr)
        lines.setFormatter(JsonLines())
        logging.basicConfig(level=logging.INFO, handlers=[lines])
        # Which parts of itself it sets up is no event of the server's.
        logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
        run(settings, ready=lambda url: typer.echo(f"art serve: {url}"))
    except (ArtError, CannotServe, ValueError, OSError) as error:
        _fail(str(error))


@keys_cli.command("create")
def create(
    entity: Annotated[str, typer.Argument(help="Whose models the key opens.")],
    data: _Data = None,
    database: _Database = None,
) -> None:
    """Make a key for an entity and print it, this once: it can't be read again."""
    from .keys import create_key

    with _opened(data, database) as engine:
        try:
            typer.echo(create_key(engine, entity))
        except ValueError as error:
            _fail(str(error))


@keys_cli.command("list")
def list_all(
    data: _Data = None,
    database: _Database = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """List every key by its id, without what opens anything."""
    from .keys import list_keys

    with _opened(data, database) as engine:
        keys = list_keys(engine)
    if as_json:
        typer.echo(json.dumps([vars(key) for key in keys], indent=2))
        return
    for key in keys:
        state = f"revoked {_time(key.revoked_at)}" if key.revoked_at else "open"
        typer.echo(f"{key.id}  {key.entity}  made {_time(key.created_at)}  {state}")
    if not keys:
        typer.echo("No key was made yet. To make one: art serve keys create ENTITY", err=True)


@keys_cli.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id that `art serve keys list` shows.")],
    data: _Data = None,
    database: _Database = None,
) -> None:
    """Close a key; a running server refuses it within two seconds."""
    from .keys import revoke_key

    with _opened(data, database) as engine:
        if not revoke_key(engine, key_id):
            _fail(f"no open key has the id {key_id!r}; `art serve keys list` shows them")
    typer.echo(f"{key_id} is revoked.")


@contextmanager
def _opened(data: Path | None, database: str | None) -> Iterator[Engine]:
    from .database import open_database

    folder = _data_folder(data)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = open_database(database or folder / "state.sqlite")
    try:
        yield engine
    finally:
        engine.dispose()


def _data_folder(given: Path | None) -> Path:
    if given is not None:
        return given.expanduser().resolve()
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "art-serve"


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--backend-option={text!r}: give NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _fail(message: str) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(1)
