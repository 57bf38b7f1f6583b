"""An HTTP answer that tells of work while it is done: one JSON object a line, until the work ends or the client goes.

Knows ASGI and tasks, nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from .errors import error_to_json

JSON = dict[str, Any]
Emit = Callable[[JSON], None]
ALIVE_EVERY_S = 5.0
_log = logging.getLogger(__name__)


class EventStream:
    """An ASGI answer that runs `work(emit)` in a task of its own and sends what it emits.

    The last line is `{"event": "done", "result": ...}` or `{"event": "error", ...}`. Between events a line
    `{"event": "alive"}` shows that somebody is there. When the client goes away the task is cancelled and awaited.
    """

    def __init__(self, work: Callable[[Emit], Awaitable[Any]]) -> None:
        self._work = work

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        lines: asyncio.Queue[JSON | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(lines))
        gone = asyncio.create_task(_disconnected(receive))
        gone.add_done_callback(lambda _: task.cancel())
        try:
            headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while True:
                try:
                    line = await asyncio.wait_for(lines.get(), ALIVE_EVERY_S)
                except TimeoutError:
                    line = {"event": "alive"}
                if line is None:
                    break
                await send({"type": "http.response.body", "body": orjson.dumps(line) + b"\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _run(self, lines: asyncio.Queue[JSON | None]) -> None:
        try:
            result = await self._work(lines.put_nowait)
            lines.put_nowait({"event": "done", "result": result})
        except Exception as error:
            _log.info("work failed", exc_info=error)
            lines.put_nowait({"event": "error", "error": error_to_json(error)})
        finally:
            lines.put_nowait(None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
