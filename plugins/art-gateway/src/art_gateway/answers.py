"""What becomes of an engine's answer: read by the engine's dialect, stamped with the step that gave it, or refused.

Works on bytes and JSON only; no connection is known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from art_core.engines import Endpoint
from art_core.errors import EngineRefused

from .errors import ApiError, engine_error
from .routes import Route
from .sse import DONE, EventReader

_LONGEST_EVENT = 64 * 2**20


def normalise_answer(route: Route, endpoint: Endpoint, body: bytes, altered: Sequence[str]) -> bytes:
    """A whole answer in the one form, to a request that `altered` what was drawn by these of its fields.

    Raises ApiError for one that can't be brought into it.
    """
    try:
        answer = orjson.loads(body)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise EngineRefused(route.engine.name, endpoint, "its answer is no JSON object with choices")
        return orjson.dumps(_stamp(route.engine.read_response(endpoint, answer), route, altered))
    except (orjson.JSONDecodeError, EngineRefused) as error:
        raise unreadable(route, error) from error


class StreamNormaliser:
    """Brings a stream into the one form, chunk by chunk. `ended` is true once it has said that it is over."""

    def __init__(self, route: Route, endpoint: Endpoint, altered: Sequence[str]) -> None:
        self._route, self._endpoint, self._altered = route, endpoint, altered
        self._reader = EventReader()
        self.ended = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The events that `piece` completes, as they go out. Raises ApiError for one that can't be read."""
        try:
            for event in self._reader.feed(piece):
                if event.data is None:
                    yield event.raw
                elif event.data == DONE:
                    self.ended = True
                    yield event.raw
                else:
                    chunk = self._chunk(event.data)
                    yield event.raw if chunk is None else event.with_data(orjson.dumps(chunk))
            if self._reader.left > _LONGEST_EVENT:
                raise EngineRefused(self._route.engine.name, "stream", "an event of the stream has no end")
        except (orjson.JSONDecodeError, EngineRefused) as error:
            raise unreadable(self._route, error) from error

    def _chunk(self, data: bytes) -> dict[str, Any] | None:
        """The chunk in the one form; None for what passes as it came, such as the engine's own error."""
        chunk = orjson.loads(data)
        if not isinstance(chunk, dict):
            raise EngineRefused(self._route.engine.name, "stream", "an event of the stream is no JSON object")
        if "error" in chunk:
            self.ended = True
            return None
        if not isinstance(chunk.get("choices"), list):
            return None
        return _stamp(self._route.engine.read_chunk(self._endpoint, chunk), self._route, self._altered)


def died(route: Route, error: BaseException | str) -> ApiError:
    """502: the engine was there and is gone."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}".removesuffix(": ")
    message = f"The engine behind {route.name} went away before its answer was whole ({reason}). Ask again."
    return engine_error(502, message, code="engine_died")


def unreadable(route: Route, error: Exception) -> ApiError:
    """502: the engine answered with something that must not be passed on as an answer."""
    message = f"The answer of the engine behind {route.name} cannot be used: {error}"
    return engine_error(502, message, code="engine_answer_unusable")


def _stamp(answer: dict[str, Any], route: Route, altered: Sequence[str]) -> dict[str, Any]:
    """Say which step answered, on the answer and on each of its choices, and there what altered the drawing."""
    answer["model"] = route.name
    for choice in answer["choices"]:
        choice["policy_version"] = route.step
        if altered:
            choice["altered_sampling"] = altered
    return answer
