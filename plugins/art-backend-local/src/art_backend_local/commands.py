"""`art ps` and `art down`: what runs on this machine, and ending it. Knows hosts by their records and asks them over
HTTP.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.request import ProxyHandler, Request, build_opener

import typer
from rich.console import Console
from rich.table import Table

from art_runtime.process_memory import memory_of

from .wire.host_files import HostRecord, known_hosts, read_host
from .wire.messages import PREFIX

JSON = dict[str, Any]
_ANSWER_LIMIT_S = 5.0
_END_LIMIT_S = 60.0
_GIB = 2**30


def add_commands(cli: typer.Typer) -> None:
    """Add both to the `art` command."""
    cli.command()(ps)
    cli.command()(down)


def ps(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of tables.")] = False,
) -> None:
    """List the hosts of local backends that run on this machine: their engines, models, steps and memory."""
    hosts = [(path, record, _status(record)) for path, record in known_hosts()]
    if as_json:
        typer.echo(json.dumps([_row(*host) for host in hosts], indent=2))
        return
    if not hosts:
        typer.echo("No local backend runs. One starts when a model is registered: await model.register(LocalBackend())")
        return
    console = Console()
    for path, record, status in hosts:
        kind = f"ends with process {record.owner_pid}" if record.owner_pid else "outlives its clients"
        console.print(f"{path}: process {record.pid}, port {record.port}, {kind}", markup=False, soft_wrap=True)
        if read_host(path) != record:
            console.print(f"  its folder was deleted or moved away; end it: art down --path {path}", markup=False)
        if status is None:
            console.print("  does not answer; see its logs/host.log, or end it: art down --path PATH", markup=False)
            continue
        _print_status(console, status)


def down(
    path: Annotated[
        Path | None, typer.Option("--path", help="End the host of this path only; without it, every host of yours.")
    ] = None,
) -> None:
    """End the hosts of local backends: their engines stop, nothing on disk is touched."""
    hosts = known_hosts() if path is None else _hosts_of(path.expanduser().resolve())
    if not hosts:
        typer.echo(f"No local backend runs{f' on {path}' if path else ''}.")
        return
    failed = False
    for host_path, record in hosts:
        ended = _end(record)
        failed |= not ended
        typer.echo(f"{host_path}: process {record.pid} {'has ended' if ended else 'did not end; kill -9 it'}.")
    if failed:
        raise typer.Exit(1)


def _hosts_of(path: Path) -> list[tuple[Path, HostRecord]]:
    """The host of a path, and those whose path it was before the folder was deleted."""
    record = read_host(path)
    found = {record.pid: record} if record is not None and record.alive else {}
    found |= {known.pid: known for where, known in known_hosts() if where == path}
    return [(path, record) for record in found.values()]


def _end(record: HostRecord) -> bool:
    try:
        _ask("POST", record, "shutdown")
    except OSError:
        with suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + _END_LIMIT_S
    while record.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    return not record.alive


def _status(record: HostRecord) -> JSON | None:
    try:
        answer: JSON = _ask("GET", record, "status")
    except (OSError, ValueError):
        return None
    return answer


def _ask(method: str, record: HostRecord, name: str) -> JSON:
    request = Request(
        f"{record.url}{PREFIX}/{name}", method=method, headers={"Authorization": f"Bearer {record.token}"}
    )
    # A proxy of the user's is not for the loopback interface.
    with build_opener(ProxyHandler({})).open(request, timeout=_ANSWER_LIMIT_S) as answer:
        value: JSON = json.load(answer)
    return value


def _row(path: Path, record: HostRecord, status: JSON | None) -> JSON:
    return {
        "path": str(path),
        "pid": record.pid,
        "port": record.port,
        "version": record.version,
        "owner_pid": record.owner_pid,
        "answers": status is not None,
        "memory": memory_of(record.pid),
        **(
            {}
            if status is None
            else {name: status[name] for name in ("clients", "idle_s", "engines", "workers", "models")}
        ),
    }


def _print_status(console: Console, status: JSON) -> None:
    processes = Table("process", "engine", "pid", "state", "memory", box=None, padding=(0, 2))
    for engine in status["engines"]:
        state = "up" if engine["up"] else "down"
        restarts = f", {engine['restarts']} restarts" if engine["restarts"] else ""
        processes.add_row(
            "inference",
            engine["server"].removeprefix("inference server "),
            _pid(engine),
            state + restarts,
            _memory(engine),
        )
    for worker in status["workers"]:
        processes.add_row("training", worker["engine"], _pid(worker), worker["state"], _memory(worker))
    console.print(processes)
    models = Table("model", "step", "loaded steps", "in flight", "training", box=None, padding=(0, 2))
    for model in status["models"]:
        models.add_row(
            f"{model['project']}/{model['name']}",
            str(model["routed"]),
            ", ".join(map(str, model["loaded"])),
            str(model["in_flight"]),
            "yes" if model["training"] else "no",
        )
    console.print(models)


def _pid(process: JSON) -> str:
    return str(process["pid"] or "-")


def _memory(process: JSON) -> str:
    return f"{process['memory'] / _GIB:.2f} GiB"
