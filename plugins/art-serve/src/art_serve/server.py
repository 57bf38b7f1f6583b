"""The process of `art serve`: takes the data folder, opens the backend, listens, and ends all of it in order.

Knows uvicorn and signals; what is answered is `app`'s.
"""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Generator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock, Timeout

from art_core import Backend, PluginRegistry, installed_plugins
from art_core.registry import load_factory
from art_gateway import SERVER_OPTIONS, raise_file_limit

from .app import BASE, serving_app
from .base_models import BaseModels
from .database import open_database
from .keys import list_keys
from .service import Limits, open_service

_STOP_S = 5
_log = logging.getLogger("art_serve")


class CannotServe(RuntimeError):
    """The server can't start as it was asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a server is started. `database` is a URL or a file, None for one in `data`; it may hold a password."""

    data: Path
    database: str | None = field(default=None, repr=False)
    backend: str = "local"
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    base_models: BaseModels = field(default_factory=BaseModels)
    host: str = "127.0.0.1"
    port: int = 8484
    certificate: Path | None = None
    key: Path | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def database_place(self) -> str | Path:
        """Where the state is."""
        return self.database or self.data / "state.sqlite"


def serve(settings: ServeSettings, *, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. `ready` is told the base URL once connections are taken. Raises CannotServe."""
    raise_file_limit()
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        lock = FileLock(settings.data / "server.lock")
        lock.acquire(timeout=5)
    except Timeout as error:
        raise CannotServe(f"another art serve uses {settings.data}; end it, or give another --data") from error
    try:
        check_address(settings)
        # Not uvloop: with hundreds of busy connections it leaves new ones waiting for seconds.
        with asyncio.Runner() as runner:
            runner.run(_serve(settings, ready))
    finally:
        lock.release()


def check_address(settings: ServeSettings) -> None:
    """Raise CannotServe for an address that others reach, unless a key was made."""
    if is_loopback(settings.host):
        return
    engine = open_database(settings.database_place)
    try:
        if any(key.revoked_at is None for key in list_keys(engine)):
            return
    finally:
        engine.dispose()
    raise CannotServe(
        f"--host {settings.host} is reached from other machines, and no key was made that could tell who comes. Make"
        " one first: art serve keys create ENTITY"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_backend(registry: PluginRegistry, name: str, data: Path, options: Mapping[str, Any]) -> Backend:
    """The backend of this name, its files under `data`. Raises PluginError, and CannotServe for options that it
    lacks.
    """
    factory = load_factory(registry.backend(name))
    # What suits a server, where the backend has a word for it; what the user gives is passed on whatever it is.
    suiting = {"path": data / "backend", "in_process": True, "show_progress": False}
    takes = inspect.signature(factory).parameters
    arguments = {word: value for word, value in suiting.items() if word in takes} | dict(options)
    try:
        backend: Backend = factory(**arguments)
    except TypeError as error:
        raise CannotServe(f"the backend {name!r} can't be made with {', '.join(arguments)}: {error}") from error
    return backend


async def _serve(settings: ServeSettings, ready: Callable[[str], None]) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    registry = installed_plugins()
    async with AsyncExitStack() as stack:
        backend = make_backend(registry, settings.backend, settings.data, settings.backend_options)
        await stack.enter_async_context(backend)
        service = await stack.enter_async_context(
            open_service(
                backend,
                registry,
                data=settings.data,
                database=settings.database_place,
                base_models=settings.base_models,
                limits=settings.limits,
            )
        )
        app = await stack.enter_async_context(serving_app(service))
        server = _Server(_config(app, settings))
        listener = stack.enter_context(_listen(settings))
        working = asyncio.create_task(service.worker.run(), name="training worker")
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="http server")
        stopping = asyncio.create_task(ending.wait(), name="until told to end")
        try:
            await server.until_started(serving)
            scheme = "https" if settings.certificate else "http"
            port = listener.getsockname()[1]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            ready(f"{scheme}://{host}:{port}{BASE}")
            await asyncio.wait({working, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            _log.info("the server ends")
        finally:
            server.should_exit = True
            stopping.cancel()
            working.cancel()
            await asyncio.wait({serving}, timeout=2 * _STOP_S)
            serving.cancel()
            outcomes = await asyncio.gather(working, serving, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome


def _config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    options = {name: value for name, value in SERVER_OPTIONS.items() if name != "loop"}
    tls: dict[str, Any] = (
        {"ssl_certfile": settings.certificate, "ssl_keyfile": settings.key} if settings.certificate else {}
    )
    return uvicorn.Config(app, lifespan="off", timeout_graceful_shutdown=_STOP_S, log_config=None, **options, **tls)


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        made = socket.create_server((settings.host, settings.port), family=family, backlog=SERVER_OPTIONS["backlog"])
        # Made of the file, it knows that it speaks TCP; asyncio sends small answers at once only where it reads that.
        return socket.socket(fileno=made.detach())
    except OSError as error:
        raise CannotServe(
            f"can't listen on {settings.host}, port {settings.port}: {error.strerror or error}"
        ) from error


class _Server(uvicorn.Server):
    """Uvicorn inside our own loop, which keeps the signals to itself."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._accepting = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tells `until_started`."""
        await super().startup(sockets)
        self._accepting.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Nothing: the process's own handlers are installed."""
        yield

    async def until_started(self, serving: asyncio.Task[None]) -> None:
        """Wait until it accepts connections, or raise what kept it from it."""
        accepting = asyncio.create_task(self._accepting.wait())
        await asyncio.wait({accepting, serving}, return_when=asyncio.FIRST_COMPLETED)
        accepting.cancel()
        if serving.done():
            await serving
            raise CannotServe("the server ended before it began")
