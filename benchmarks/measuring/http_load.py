"""The least HTTP server and client that can be, so that neither is what a benchmark measures.

Knows bytes, lengths and times; knows nothing of gateways or engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

ANSWER_LIMIT_S = 1800.0


class Upstream(asyncio.Protocol):
    """The least HTTP server that can be: any whole request is answered with the same bytes, after a while."""

    def __init__(self, answer: bytes, think_s: float) -> None:
        self.answer, self.think_s = answer, think_s
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # What the loop gives is always one; the base class says less.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end or len(body) < _length(head):
            return
        self.buffer = b""
        if self.think_s:
            asyncio.get_running_loop().call_later(self.think_s, self.transport.write, self.answer)
        else:
            self.transport.write(self.answer)


class Asker(asyncio.Protocol):
    """The least HTTP client that can be: asks again as soon as it is answered, while `go_on` says so."""

    def __init__(
        self, request: bytes, seconds: list[float], go_on: Callable[[], bool], done: asyncio.Future[None]
    ) -> None:
        self.request, self.seconds, self.go_on, self.done = request, seconds, go_on, done
        self.head = b""
        self.missing: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask the first time."""
        # What the loop gives is always one; the base class says less.
        self.transport = cast("asyncio.Transport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Ask again once the answer is whole."""
        if self.missing is None:
            self.head += data
            head, end, body = self.head.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self.done.set_exception(RuntimeError(f"not an answer: {self.head[:500]!r}"))
                self.transport.abort()
                return
            self.missing = _length(head) - len(body)
        else:
            self.missing -= len(data)
        if self.missing > 0:
            return
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        if self.go_on():
            self._ask()
        else:
            self.transport.close()
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """An answer that never came is an error."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the connection was closed before the answer came"))

    def _ask(self) -> None:
        self.head, self.missing = b"", None
        self.began = time.perf_counter()
        self.transport.write(self.request)


def request_bytes(port: int, path: str, key: str, body: bytes) -> bytes:
    """A whole POST of JSON, as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def ask_for(seconds: float, port: int, request: bytes, concurrency: int) -> list[float]:
    """Keep `concurrency` requests under way for some seconds; the seconds that each answer took."""
    stop_at = time.perf_counter() + seconds
    return await _ask(port, request, concurrency, lambda: time.perf_counter() < stop_at)


async def ask_times(count: int, port: int, request: bytes, concurrency: int) -> list[float]:
    """Ask `count` times, at most `concurrency` at once; the seconds that each answer took."""
    left = count - concurrency

    def go_on() -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    return await _ask(port, request, concurrency, go_on)


async def _ask(port: int, request: bytes, concurrency: int, go_on: Callable[[], bool]) -> list[float]:
    loop = asyncio.get_running_loop()
    took: list[float] = []
    ends: list[asyncio.Future[None]] = []
    for _ in range(concurrency):
        done: asyncio.Future[None] = loop.create_future()
        ends.append(done)
        await loop.create_connection(lambda done=done: Asker(request, took, go_on, done), "127.0.0.1", port)  # type: ignore[misc]
    async with asyncio.timeout(ANSWER_LIMIT_S):
        await asyncio.gather(*ends)
    return took


def _length(head: bytes) -> int:
    lowered = head.lower()
    start = lowered.index(b"content-length:") + 15
    return int(lowered[start:].split(b"\r\n", 1)[0])
