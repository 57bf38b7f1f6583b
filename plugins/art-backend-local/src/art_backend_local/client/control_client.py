"""A client's end of the control API: its connection to the path's host, opened when it is needed, on each event loop.

The connection is also the client's presence: while it is open the host keeps what the client leases and trains. Knows
HTTP and errors as JSON; knows nothing of models.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import aiohttp
import orjson
from pydantic import BaseModel

from art_core.errors import BackendUnreachable
from art_engine_kit.event_stream import EventLines, LineTooLong
from art_engine_kit.showing import Shown
from art_runtime import Child

from ..wire.errors import error_from_json, unreachable
from ..wire.host_files import HostRecord
from ..wire.messages import PREFIX
from ..wire.told_work import OnEvent, followed
from .backend_path import check_tellable
from .host_start import find_host, start_host

JSON = dict[str, Any]
T = TypeVar("T")
_log = logging.getLogger(__name__)
SILENCE_LIMIT_S = 60.0
CALL_LIMIT_S = 300.0
_LEAVE_POLL_S = 0.02
_DYING_LIMIT_S = 5.0


@dataclass
class _Connection:
    http: aiohttp.ClientSession
    session: str
    listening: asyncio.Task[None]


class ControlClient:
    """Talks to the host of a path. `in_process` ties the host's life to this process; `show` says what it waits for."""

    def __init__(self, path: Path, *, in_process: bool, idle_timeout_s: float, show: bool = True) -> None:
        self.path = path
        self._show = show
        self._in_process = in_process
        self._idle_timeout_s = idle_timeout_s
        self._child: Child | None = None
        # Hosts whose path was deleted: they end by themselves, and are waited for with the last.
        self._left: list[Child] = []
        self._connections: WeakKeyDictionary[asyncio.AbstractEventLoop, _Connection] = WeakKeyDictionary()
        self._locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

    async def session(self) -> str:
        """The id of this client's session, with the host started if there is none."""
        return (await self._connected()).session

    async def call(self, name: str, request: BaseModel) -> JSON:
        """One question, one answer. Raises the host's error as the type that it was."""
        connection = await self._connected()

        async def ask() -> JSON:
            async with connection.http.post(
                f"{PREFIX}/{name}",
                data=_body(request),
                timeout=aiohttp.ClientTimeout(total=CALL_LIMIT_S),
            ) as response:
                answer: JSON = orjson.loads(await response.read())
                return answer

        try:
            answer = await self._while_connected(connection, ask())
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise await self._lost(connection, error) from error
        if "error" in answer:
            raise error_from_json(answer["error"])
        return answer

    async def follow(self, name: str, request: BaseModel, on_event: OnEvent) -> JSON:
        """Start work in the host and follow it to its end; cancelling this cancels the work. Gives its result.

        Raises the host's error as the type that it was, BackendUnreachable when the host is gone or silent.
        """
        connection = await self._connected()

        async def ask() -> JSON | None:
            async with connection.http.post(
                f"{PREFIX}/{name}",
                data=_body(request),
                timeout=aiohttp.ClientTimeout(total=None, sock_read=SILENCE_LIMIT_S),
            ) as response:
                return await followed(response.content.iter_any(), on_event)

        try:
            result = await self._while_connected(connection, ask())
        except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError, LineTooLong) as error:
            raise await self._lost(connection, error) from error
        if result is None:
            raise unreachable(self.path, "its answer ended early")
        return result

    async def _lost(self, connection: _Connection, error: Exception) -> BackendUnreachable:
        """The error for a host that didn't answer. One that takes no connections is given up at once, so that the next
        call looks for another, even before the session is seen to end.
        """
        if isinstance(error, aiohttp.ClientConnectorError) and connection in self._connections.values():
            await self.hang_up()
        return unreachable(self.path, repr(error))

    async def _while_connected(self, connection: _Connection, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives. Raises BackendUnreachable when the session ends meanwhile, since a request that was under
        way then is told of nothing any more.
        """
        task = asyncio.ensure_future(work)
        both: list[asyncio.Future[Any]] = [task, connection.listening]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            ended = connection.listening
            cause = None if ended.cancelled() else ended.exception()
            raise unreachable(self.path, repr(cause or "the connection was closed"))
        return task.result()

    async def hang_up(self) -> None:
        """Close this event loop's connection; the host lets go of what the client held. It may be opened again."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            connection.listening.cancel()
            await asyncio.gather(connection.listening, return_exceptions=True)

    async def close(self) -> None:
        """Hang up; a host that belongs to this client is stopped and waited for."""
        await self.hang_up()
        children = self._own_hosts()
        for child in children:
            child.end()
        task = asyncio.current_task()
        try:
            with Shown(f"Closing: waiting for the host of {self.path} to end", enabled=self._show and bool(children)):
                # Whoever cancels a second time is in a hurry, also when the first was long before.
                while any(child.poll() is None for child in children) and (task is None or task.cancelling() < 2):
                    await asyncio.sleep(_LEAVE_POLL_S)
        finally:
            for child in children:
                child.let_go()

    def close_now(self) -> None:
        """`close` for code without an event loop; connections end with their loops."""
        for child in self._own_hosts():
            child.stop()

    def _own_hosts(self) -> list[Child]:
        """The hosts that end with this client, from now on forgotten."""
        children = [*self._left, *([self._child] if self._child is not None else [])]
        self._left, self._child = [], None
        return children if self._in_process else []

    async def _connected(self) -> _Connection:
        loop = asyncio.get_running_loop()
        lock = self._locks.setdefault(loop, asyncio.Lock())
        async with lock:
            connection = self._connections.get(loop)
            if connection is not None and not connection.listening.done():
                return connection
            with Shown(f"Finding the host of {self.path}", enabled=self._show) as shown:
                record = await self._host(shown.update)
            try:
                connection = await self._connect(record)
            except BackendUnreachable:
                if not await _dies(record):
                    raise
                connection = await self._connect(await self._host(lambda _: None))
            self._connections[loop] = connection
            return connection

    async def _host(self, say: Callable[[str], None]) -> HostRecord:
        def of_host(what: str) -> None:
            say(f"The host of {self.path}: {what}")

        record = await find_host(self.path, in_process=self._in_process, own=self._child, say=of_host)
        if record is None:
            if self._child is not None:
                self._left.append(self._child)
            started, self._child = await start_host(
                self.path, in_process=self._in_process, idle_timeout_s=self._idle_timeout_s, say=of_host
            )
            return started
        return record

    async def _connect(self, record: HostRecord) -> _Connection:
        http = aiohttp.ClientSession(
            record.url,
            headers={"Authorization": f"Bearer {record.token}", "Content-Type": "application/json"},
            connector=aiohttp.TCPConnector(limit=0),
        )
        started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        listening = asyncio.create_task(self._listen(http, started), name=f"session with the host of {self.path}")
        # What ended it is told by the next call; nobody awaits the task.
        listening.add_done_callback(lambda task: task.cancelled() or task.exception())
        both: list[asyncio.Future[Any]] = [started, listening]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED, timeout=SILENCE_LIMIT_S)
        if not started.done():
            listening.cancel()
            cause = (await asyncio.gather(listening, return_exceptions=True))[0]
            raise unreachable(self.path, repr(cause))
        return _Connection(http, started.result(), listening)

    async def _listen(self, http: aiohttp.ClientSession, started: asyncio.Future[str]) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_LIMIT_S)
        # An event loop that ends cancels its tasks, so this one closes the connections, whoever forgot to.
        async with http, http.post(f"{PREFIX}/session", data=b"{}", timeout=timeout) as response:
            async for line in EventLines(response.content.iter_any()):
                event = orjson.loads(line)
                if event["event"] == "session":
                    started.set_result(event["id"])
                elif event["event"] == "warning":
                    _warn(event["message"])


def _warn(sentence: str) -> None:
    try:
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        # Where warnings are errors, this one has nobody to reach, and the session must not end of it.
        _log.warning(sentence)


def _body(request: BaseModel) -> str:
    """The request as JSON. Raises PathUnusable for a path in it that other processes can't be told of."""
    for name, value in request:
        if isinstance(value, Path):
            check_tellable(value, name)
    return request.model_dump_json()


async def _dies(record: HostRecord) -> bool:
    """True when a host that doesn't answer turns out to have been at its end."""
    deadline = asyncio.get_running_loop().time() + _DYING_LIMIT_S
    while record.alive and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_LEAVE_POLL_S)
    return not record.alive
