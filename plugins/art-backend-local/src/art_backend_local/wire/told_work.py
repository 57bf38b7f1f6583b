"""Work that the host does while its client follows it: both ends, one that tells and one that is told.

Knows how work ends, done or in an error; knows nothing of what it is.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson

from art_engine_kit.event_stream import Emit as EmitLine
from art_engine_kit.event_stream import EventLines, EventStream

from .errors import error_from_json, error_to_json

JSON = dict[str, Any]
Emit = Callable[[JSON], None]
OnEvent = Callable[[JSON], Awaitable[None] | None]
_log = logging.getLogger(__name__)


def told(work: Callable[[Emit], Awaitable[Any]]) -> EventStream:
    """An ASGI answer of what `work` emits, and in the end of its result or its error."""

    async def tell(emit: EmitLine) -> None:
        try:
            result = await work(lambda event: emit(orjson.dumps(event)))
            emit(orjson.dumps({"event": "done", "result": result}))
        except Exception as error:
            _log.info("work failed", exc_info=error)
            emit(orjson.dumps({"event": "error", "error": error_to_json(error)}))

    return EventStream(tell)


async def followed(pieces: AsyncIterator[bytes], on_event: OnEvent) -> JSON | None:
    """The result of work that is told in these pieces, None when they end before it does. What `on_event` gives is
    awaited before the next event is read.

    Raises its error as the type that it was.
    """
    async for line in EventLines(pieces):
        event = orjson.loads(line)
        if "error" in event:
            raise error_from_json(event["error"])
        if event["event"] == "done":
            return event["result"] or {}
        if (outcome := on_event(event)) is not None:
            await outcome
    return None
