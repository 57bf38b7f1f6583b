"""One JSON object a line, over HTTP: the answer that tells of work while it is done, its reader, and the key check.

Knows ASGI and tasks; knows no web framework, no HTTP library, and nothing of what the work or a line is.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Self, TypeAlias

# ASGI's own types, the same as Starlette's.
Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

Emit: TypeAlias = Callable[[str | bytes], None]
ALIVE = b'{"event":"alive"}'
ALIVE_EVERY_S = 5.0
LONGEST_LINE = 2**24
_log = logging.getLogger(__name__)


class EventStream:
    """An ASGI answer that runs `work(emit)` in a task of its own and sends what it emits, JSON without line breaks.

    Between events a line ALIVE shows that somebody is there. When the client goes away the task is cancelled and
    awaited. What the work has to say in the end, errors included, it emits: one that raises is logged and ends the
    answer.
    """

    def __init__(self, work: Callable[[Emit], Awaitable[None]]) -> None:
        self._work = work

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whose body has been read."""
        lines: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(lines), name="work of an event stream")
        gone = asyncio.create_task(client_gone(receive), name="client of an event stream")
        gone.add_done_callback(lambda _: task.cancel())
        try:
            headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while (line := await _next(lines)) is not None:
                body = line.encode() if isinstance(line, str) else line
                await send({"type": "http.response.body", "body": body + b"\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _run(self, lines: asyncio.Queue[str | bytes | None]) -> None:
        try:
            await self._work(lines.put_nowait)
        except Exception:
            _log.exception("the work of an event stream failed without saying so")
        finally:
            lines.put_nowait(None)


async def _next(lines: asyncio.Queue[str | bytes | None]) -> str | bytes | None:
    try:
        async with asyncio.timeout(ALIVE_EVERY_S):
            return await lines.get()
    except TimeoutError:
        return ALIVE


class LineTooLong(ValueError):
    """A line of an event stream is longer than its reader takes."""


class EventLines:
    """The lines of an event stream, without those that only say ALIVE, out of the pieces in which it arrives.

    What follows the last line break is no line: the answer was cut off. Raises LineTooLong, and what `pieces` raises.
    """

    def __init__(self, pieces: AsyncIterator[bytes], *, limit: int = LONGEST_LINE) -> None:
        self._pieces = pieces
        self._limit = limit
        self._lines: deque[bytes] = deque()
        self._begun = b""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while True:
            while self._lines:
                line = self._lines.popleft().strip()
                if line and line.replace(b" ", b"") != ALIVE:
                    return line
            *lines, self._begun = (self._begun + await anext(self._pieces)).split(b"\n")
            self._lines.extend(lines)
            if max(map(len, (*lines, self._begun))) > self._limit:
                raise LineTooLong(f"a line of more than {self._limit} bytes came, which is no event")


async def client_gone(receive: Receive) -> None:
    """Return when the client of a request, whose body has been read, has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


def has_key(scope: Scope, key: str) -> bool:
    """True when the request says `Authorization: Bearer KEY`; takes the same time whatever it says."""
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    return hmac.compare_digest(given, f"Bearer {key}".encode())
