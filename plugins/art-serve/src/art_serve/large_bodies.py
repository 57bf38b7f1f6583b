"""Takes large bodies in: to disk while they arrive, a few of one entity at a time, and read a few at a time in all.

A client whose body comes slowly holds up nobody but its own entity, and fills no memory.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

from starlette.requests import Request

from art_gateway.errors import ApiError

from .kept_files import Arrived, KeptFiles
from .request_bodies import BodyLimits, pieces_of

P = ParamSpec("P")
T = TypeVar("T")
_READ_AT_ONCE = 2
_RETRY_S = 5.0


class LargeBodies:
    """`at_once` bodies of one entity may be arriving."""

    def __init__(self, files: KeptFiles, limits: BodyLimits, *, at_once: int) -> None:
        self._files = files
        self._limits = limits
        self._at_once = at_once
        self._arriving: Counter[str] = Counter()
        self._reading = asyncio.Semaphore(_READ_AT_ONCE)

    @asynccontextmanager
    async def arriving(self, request: Request, *, limit: int) -> AsyncIterator[Arrived]:
        """The body of a request, on disk. Raises ApiError: 429, and as `pieces_of` does."""
        entity: str = request.state.entity
        if self._arriving[entity] >= self._at_once:
            message = f"{self._at_once} bodies of {entity!r} are arriving already; send this one when one has."
            raise ApiError(429, message, code="too_many_uploads", retry_after_s=_RETRY_S)
        self._arriving[entity] += 1
        try:
            pieces = pieces_of(request, limit=limit, limits=self._limits)
            async with self._files.arriving(pieces) as arrived:
                yield arrived
        finally:
            self._arriving[entity] -= 1
            if not self._arriving[entity]:
                del self._arriving[entity]

    async def read(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what reads a whole body, in a thread, when it is its turn: no more bodies are in memory than that."""
        async with self._reading:
            return await asyncio.to_thread(function, *args, **kwargs)
