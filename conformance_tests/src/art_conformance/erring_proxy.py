"""A peer that errs at random: a real HTTP server on loopback in front of another, which answers late, breaks off,
garbles, refuses, or delivers a request twice. A seed says when and how.

Knows HTTP/1.1, a request to a connection; knows nothing of what is said over it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Self

import httpx

_LIMIT_S = 120.0
_LATE_S = 0.3
_NOT_PASSED_ON = {"host", "connection", "content-length", "transfer-encoding", "expect"}
_NOT_PASSED_BACK = {"connection", "content-length", "transfer-encoding", "content-encoding", "date", "server"}


class Fault(Enum):
    """What may become of a request. All but the first three reach the server behind."""

    NOT_TAKEN = "503 before it arrived"
    NOT_CONNECTED = "the connection ends before it arrived"
    LATE = "it arrives late"
    TWICE = "it arrives twice"
    BROKEN = "500 after it was done"
    GATEWAY = "502 after it was done"
    LOST = "the connection ends after it was done"
    CUT = "the connection ends in the middle of its answer"
    GARBLED = "half of its answer, as if it were whole"


@dataclass(frozen=True)
class _Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes


class ErringProxy:
    """In front of the server at `upstream`, an address without a path; `url` is its own. Well until `rate` is raised:
    the share of requests that a fault becomes of, among those that `errs_at` says yes to, given method and path.

    `said` is what became of each request, for messages. For one event loop.
    """

    def __init__(self, upstream: str, *, seed: int, errs_at: Callable[[str, str], bool] = lambda *_: True) -> None:
        self.rate = 0.0
        self.said: list[str] = []
        self.url = ""
        self._upstream = upstream
        self._errs_at = errs_at
        self._chance = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(base_url=self._upstream, timeout=_LIMIT_S, trust_env=False)
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    def fault(self, method: str, path: str) -> Fault | None:
        """What the next request of this kind meets."""
        if not self._errs_at(method, path) or self._chance.random() >= self.rate:
            return None
        return self._chance.choice(list(Fault))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._one(reader, writer), name="a connection of the erring proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_LIMIT_S):
                request = await _read(reader)
                fault = self.fault(request.method, request.target.partition("?")[0])
                self.said.append(f"{request.method} {request.target}: {fault.value if fault else 'well'}")
                writer.write(await self._answer(request, fault))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            # The client has gone, as clients of a peer that errs do.
            writer.transport.abort()
        finally:
            writer.close()

    async def _answer(self, request: _Request, fault: Fault | None) -> bytes:
        """The bytes that the client is sent before its connection ends."""
        if fault is Fault.NOT_CONNECTED:
            return b""
        if fault is Fault.NOT_TAKEN:
            return _written(503, [("retry-after", "0")], b'{"error": {"message": "too busy"}}')
        if fault is Fault.LATE:
            await asyncio.sleep(_LATE_S)
        try:
            answer = await self._pass_on(request)
            if fault is Fault.TWICE:
                # Whichever answer the client hears, it has asked once.
                answer = self._chance.choice([answer, await self._pass_on(request)])
        except httpx.TransportError as error:
            return _written(502, [], f'{{"error": {{"message": "nobody is behind: {type(error).__name__}"}}}}'.encode())
        half = answer.content[: len(answer.content) // 2]
        headers = [(name, value) for name, value in answer.headers.items() if name not in _NOT_PASSED_BACK]
        match fault:
            case Fault.LOST:
                return b""
            case Fault.BROKEN | Fault.GATEWAY:
                status = 500 if fault is Fault.BROKEN else 502
                return _written(status, [], b"<html>an error page</html>")
            case Fault.CUT:
                return _written(answer.status_code, headers, half, length=len(answer.content) + 1)
            case Fault.GARBLED:
                return _written(answer.status_code, headers, half)
        return _written(answer.status_code, headers, answer.content)

    async def _pass_on(self, request: _Request) -> httpx.Response:
        headers = [(name, value) for name, value in request.headers if name.lower() not in _NOT_PASSED_ON]
        return await self._http.request(request.method, request.target, headers=headers, content=request.body)


def _written(status: int, headers: list[tuple[str, str]], body: bytes, *, length: int | None = None) -> bytes:
    named = [*headers, ("connection", "close")]
    # An answer of 204 has no body, and says no length.
    named += [] if status == 204 else [("content-length", str(len(body) if length is None else length))]
    head = "".join(f"{name}: {value}\r\n" for name, value in named)
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body


async def _read(reader: asyncio.StreamReader) -> _Request:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    named = {name.lower(): value for name, value in headers}
    if named.get("transfer-encoding", "").lower() != "chunked":
        return _Request(method, target, headers, await reader.readexactly(int(named.get("content-length", "0"))))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return _Request(method, target, headers, body)
