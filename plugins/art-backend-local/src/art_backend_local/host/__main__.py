"""The host process: `python -m art_backend_local.host --path PATH`. Gateway and control API in one server on one port.

Takes the path's lock, writes `host.json` once it answers, and ends when it is told to, when nobody has used it for a
while, or when the client it belongs to has gone. Everything it does in between is the state's.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import uvicorn
from filelock import FileLock
from starlette.types import ASGIApp, Receive, Scope, Send

from art_core import installed_plugins
from art_gateway import SERVER_OPTIONS, Gateway, GatewayLimits, Listener, raise_file_limit, requests_at_once
from art_runtime.process_identity import identity_of

from ..wire.host_files import (
    LOCK_FILE,
    PATH_IN_USE,
    HostRecord,
    lock_path,
    read_host,
    remember_host,
    remove_host,
    write_host,
)
from ..wire.messages import PREFIX
from .control_app import ControlApp
from .host import Host
from .routes import GATE_LIMIT_S, HostRoutes
from .sessions import Sessions

DISTRIBUTION = "art-backend-local"
_LOOK_EVERY_S = 1.0
# A file system of other machines may be away for a moment.
_LOST_LOOKS = 3
_log = logging.getLogger("art_backend_local.host")


async def run_host(path: Path, *, idle_timeout_s: float, owner_pid: int | None) -> None:
    """Serve until told to end. The caller holds the path's lock."""
    sessions = Sessions()
    host = Host(path, installed_plugins(), sessions)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    _tell_warnings(host, loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    with Listener(backlog=SERVER_OPTIONS["backlog"], full=lambda: server.full) as listener:
        port = listener.getsockname()[1]
        token, api_key = secrets.token_urlsafe(24), f"art-{secrets.token_urlsafe(24)}"
        routes = HostRoutes(host.models, used=sessions.used)
        async with Gateway(routes, api_key=api_key, limits=GatewayLimits(route_s=GATE_LIMIT_S)) as gateway:
            control = ControlApp(host, token=token, api_key=api_key, port=port, shut_down=ending.set)
            server = _Server(_by_address(control.app, gateway.app))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            record = HostRecord(
                path=str(path),
                pid=os.getpid(),
                identity=identity_of(os.getpid()),
                port=port,
                token=token,
                version=version(DISTRIBUTION),
                owner_pid=owner_pid,
                owner_identity=identity_of(owner_pid) if owner_pid is not None else None,
            )
            try:
                await server.until_started(serving)
                write_host(path, record)
                await asyncio.to_thread(_remember, record)
                _log.info("serving %s on port %d", path, port)
                await _until_over(ending, serving, sessions, idle_timeout_s, record)
            finally:
                remove_host(path, os.getpid())
                server.should_exit = True
                await asyncio.wait({serving}, timeout=10)
                serving.cancel()
                await host.close()


def _tell_warnings(host: Host, loop: asyncio.AbstractEventLoop) -> None:
    """Python's warnings here, such as those of corrupt checkpoints, reach the clients; each once."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        loop.call_soon_threadsafe(host.report, str(message))

    warnings.simplefilter("default", RuntimeWarning)
    warnings.showwarning = show


class _Server(uvicorn.Server):
    """Uvicorn inside our own loop, which keeps the signals to itself."""

    def __init__(self, app: ASGIApp) -> None:
        options = {name: value for name, value in SERVER_OPTIONS.items() if name != "loop"}
        super().__init__(uvicorn.Config(app, lifespan="off", timeout_graceful_shutdown=3, **options))
        self._accepting = asyncio.Event()
        self._most = requests_at_once()

    @property
    def full(self) -> bool:
        """Whether each further request would take a file that one of those here needs."""
        return len(self.server_state.connections) >= self._most

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tells `until_started`."""
        await super().startup(sockets)
        self._accepting.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Nothing: the host's own handlers are installed."""
        yield

    async def until_started(self, serving: asyncio.Task[None]) -> None:
        """Wait until it accepts connections, or raise what kept it from it."""
        accepting = asyncio.create_task(self._accepting.wait())
        await asyncio.wait({accepting, serving}, return_when=asyncio.FIRST_COMPLETED)
        accepting.cancel()
        if serving.done():
            await serving
            raise RuntimeError("the server ended before it began")


async def _until_over(
    ending: asyncio.Event, serving: asyncio.Task[None], sessions: Sessions, idle_timeout_s: float, record: HostRecord
) -> None:
    path, lock = Path(record.path), _file_of(Path(record.path) / LOCK_FILE)
    lost = 0
    while not ending.is_set() and not serving.done():
        try:
            await asyncio.wait_for(ending.wait(), _LOOK_EVERY_S)
        except TimeoutError:
            if record.owner_pid is not None and not record.owner_alive:
                _log.info("the client %d has gone", record.owner_pid)
                return
            if record.owner_pid is None and sessions.idle_s > idle_timeout_s:
                _log.info("nobody has used this host for %g s", idle_timeout_s)
                return
            lost = 0 if await asyncio.to_thread(_still_told, path, lock, record) else lost + 1
            if lost == _LOST_LOOKS:
                # What it served is gone with it, and the next client starts a host of its own.
                sessions.tell_all(f"The folder {path} was deleted or moved away, so its host ends.")
                _log.warning("%s was deleted or moved away", path)
                return


def _still_told(path: Path, lock: tuple[int, int] | None, record: HostRecord) -> bool:
    """Whether the path is still this host's, whose lock is this file. A record that somebody removed is put back."""
    if lock is None or _file_of(path / LOCK_FILE) != lock:
        return False
    if read_host(path) != record:
        try:
            write_host(path, record)
        except OSError as error:
            _log.warning("host.json is gone and cannot be written again: %s", error)
    return True


def _file_of(path: Path) -> tuple[int, int] | None:
    """Which file lies at a path; None when there is none. Raises nothing: what can't be looked at is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remember(record: HostRecord) -> None:
    try:
        remember_host(record)
    except OSError as error:
        warnings.warn(
            f"`art ps` and `art down` without a path won't find the host of {record.path}: there is no place for the"
            f" list of hosts ({error}). To end it: art down --path {record.path}",
            RuntimeWarning,
            stacklevel=2,
        )


def _by_address(control: ASGIApp, gateway: ASGIApp) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inner = control if scope.get("path", "").startswith(f"{PREFIX}/") else gateway
        await inner(scope, receive, send)

    return app


def _hold(path: Path) -> FileLock:
    path.mkdir(parents=True, exist_ok=True)
    # A client that looks whether the path is locked has the lock for a moment.
    lock = lock_path(path, patience_s=1.0)
    if lock is None:
        print(f"another host has {path}", file=sys.stderr)
        raise SystemExit(PATH_IN_USE)
    return lock


def main(argv: list[str] | None = None) -> None:
    """Run a host until it ends. Exit status 75 when another host has the path."""
    parser = argparse.ArgumentParser(prog="python -m art_backend_local.host", description="Serve one path's models.")
    parser.add_argument("--path", required=True, type=Path)
    parser.add_argument("--idle-timeout", default=1800.0, type=float, metavar="SECONDS")
    parser.add_argument("--owner-pid", type=int, help="the client that this host ends with")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    raise_file_limit()
    lock = _hold(arguments.path)
    try:
        # Not uvloop: with hundreds of busy connections it leaves new ones waiting for seconds.
        with asyncio.Runner() as runner:
            runner.run(run_host(arguments.path, idle_timeout_s=arguments.idle_timeout, owner_pid=arguments.owner_pid))
    finally:
        lock.release()


if __name__ == "__main__":
    main()
