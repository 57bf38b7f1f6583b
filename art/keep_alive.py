"""A keep-alive HTTP/1.1 client for one kind of request: POST a body, read the whole answer.

It holds thousands of connections at once and does a fixed amount of work per request however many there are. It knows
nothing of OpenAI, of retries or of redirects: an answer is returned whatever its status, and every failure is an
OSError. Responses are parsed by httptools.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult

import httptools

from .open_files import file_limit, room_for_a_file
from .pacing import WakingPace

if TYPE_CHECKING:
    from ssl import SSLContext

# Servers queue a limited number of connections that they have not accepted yet (2048 for uvicorn); one more is dropped
# and costs its client a second.
CONNECTING_AT_ONCE = 256
# Files are closed by others too, who tell nobody.
_LOOK_AGAIN_S = 0.2


@dataclass(slots=True)
class Answer:
    """A whole HTTP answer; header names are lower case."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class _Connection(asyncio.Protocol):
    """One connection: idle, or with one request under way whose answer goes to `waiter`."""

    def __init__(self, pool: KeepAlivePool) -> None:
        self._pool = pool
        self._parser: Any = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer = Answer()
        self._chunks: list[bytes] = []
        self.waiter: asyncio.Future[Answer] | None = None
        self.open = False
        self.idle_since = 0.0

    def send(self, request: bytes, waiter: asyncio.Future[Answer]) -> None:
        assert self._transport is not None
        self._answer, self._chunks, self.waiter = Answer(), [], waiter
        self._transport.write(request)

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.open = transport, True
        self._pool.connections.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the server's answer is not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._pool.forget(self)
        lengthless = not {"content-length", "transfer-encoding"} & self._answer.headers.keys()
        if error is None and self._answer.status and lengthless:
            self._succeed()  # such an answer ends with its connection
        else:
            self._fail(error or ConnectionResetError("the server closed the connection before it answered"))

    # httptools' side

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        if 100 <= self._answer.status < 200:  # the answer itself is still to come
            self._answer = Answer()
            return
        reusable = self._parser.should_keep_alive()
        self._succeed()
        if not reusable:
            self.close()

    def _succeed(self) -> None:
        self._answer.body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        if self.waiter is not None:
            self._pool.hand_out(self.waiter, self._answer)
            self.waiter = None

    def _fail(self, error: Exception) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(error)


class KeepAlivePool:
    """Connections to one server, of one event loop. Whoever makes it closes it.

    A connection that was idle for longer than `idle_s` seconds is not used again, as the server may be about to close
    it. When this process may open no more files, requests wait for the connections of those before them.
    """

    def __init__(self, address: SplitResult, *, tls: SSLContext | None, idle_s: float = 15.0) -> None:
        self._host = address.hostname or ""
        self._port = address.port or (443 if tls else 80)
        self._tls = tls
        self._idle_s = idle_s
        self._idle: dict[_Connection, None] = {}
        self._resolved: str | None = None
        self._connecting = asyncio.Semaphore(CONNECTING_AT_ONCE)
        self._file_limit = file_limit()
        self._short_of_files: deque[asyncio.Future[None]] = deque()
        self._answered: deque[tuple[asyncio.Future[Answer], Answer]] = deque()
        self._pace = WakingPace()
        self.connections: set[_Connection] = set()

    async def post(self, head: bytes, body: bytes, *, connect_s: float | None, answer_s: float | None) -> Answer:
        """Send `head` (request line and headers, without the content length and the empty line) and `body`.

        Raises OSError (TimeoutError among them) when no whole answer came.
        """
        loop = asyncio.get_running_loop()
        connection = None if self._short_of_files else self._take(loop)
        if connection is None:
            connection = await self._connect(loop, connect_s, answer_s)
        waiter: asyncio.Future[Answer] = loop.create_future()
        late = loop.call_later(answer_s, _time_out, waiter, answer_s) if answer_s is not None else None
        try:
            connection.send(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body), waiter)
            answer = await waiter
            self._pace.woke(loop.time())
        except BaseException:
            connection.close()
            raise
        finally:
            if late is not None:
                late.cancel()
        if connection.open:
            connection.idle_since = loop.time()
            self._idle[connection] = None
        self._wake_one()
        return answer

    def hand_out(self, waiter: asyncio.Future[Answer], answer: Answer) -> None:
        """Give a waiter its answer in a later round of the event loop, a few in each."""
        if not self._answered:
            waiter.get_loop().call_soon(self._hand_out_some)
        self._answered.append((waiter, answer))

    def _hand_out_some(self) -> None:
        for _ in range(min(self._pace.at_once(), len(self._answered))):
            waiter, answer = self._answered.popleft()
            if not waiter.done():
                waiter.set_result(answer)
        if self._answered:
            self._answered[0][0].get_loop().call_soon(self._hand_out_some)

    def forget(self, connection: _Connection) -> None:
        """The connection is gone."""
        self.connections.discard(connection)
        self._idle.pop(connection, None)
        self._wake_one()

    def give_up_idle(self) -> bool:
        """Drop a connection that has nothing to do, for the sake of its file; False when there is none."""
        if not self._idle:
            return False
        connection, _ = self._idle.popitem()
        connection.close()
        return True

    def close(self) -> None:
        """Drop every connection; requests under way fail."""
        for connection in list(self.connections):
            connection.close()

    def _take(self, loop: asyncio.AbstractEventLoop) -> _Connection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.open and loop.time() - connection.idle_since < self._idle_s:
                return connection
            connection.close()
        return None

    async def _connect(
        self, loop: asyncio.AbstractEventLoop, limit_s: float | None, answer_s: float | None
    ) -> _Connection:
        async with self._connecting, asyncio.timeout(answer_s):
            while True:
                async with asyncio.timeout(limit_s):
                    resolved = await self._address(loop)
                if (freed := self._take(loop)) is not None:
                    return freed
                if not room_for_a_file(self._file_limit):
                    _say_that_files_are_short(self._file_limit)
                    await self._until_freed(loop)
                    continue
                try:
                    async with asyncio.timeout(limit_s):
                        _, connection = await loop.create_connection(
                            lambda: _Connection(self),
                            resolved,
                            self._port,
                            ssl=self._tls,
                            server_hostname=self._host if self._tls else None,
                        )
                    return connection
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        self._resolved = None  # the name may stand for another address by now
                        raise

    async def _address(self, loop: asyncio.AbstractEventLoop) -> str:
        if self._resolved is None:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._resolved = str(found[0][4][0])
        return self._resolved

    async def _until_freed(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait in line until a connection is idle or closed, or for a moment."""
        freed: asyncio.Future[None] = loop.create_future()
        self._short_of_files.append(freed)
        try:
            await asyncio.wait({freed}, timeout=_LOOK_AGAIN_S)
        finally:
            if not freed.done():
                self._short_of_files.remove(freed)

    def _wake_one(self) -> None:
        if self._short_of_files:
            self._short_of_files.popleft().set_result(None)


def _say_that_files_are_short(limit: int) -> None:
    # Python says it once.
    warnings.warn(
        f"This process may have {limit} files open at once, and each request takes one: those beyond it wait for those"
        " before them. To have more at once, raise the limit before you start it: ulimit -n (its bound: ulimit -Hn).",
        RuntimeWarning,
        stacklevel=2,
    )


def _time_out(waiter: asyncio.Future[Answer], limit_s: float) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError(f"no whole answer within {limit_s:g} s"))
