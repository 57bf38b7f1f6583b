"""Work that a cancellation may not cut in two. Knows tasks only."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives or raises. A cancellation meanwhile doesn't reach it, and is raised once it has ended.

    `work` has a limit of its own: nobody can hurry it.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        # Retrieved, or the loop complains of it; the cancellation is what the caller has to hear.
        if not task.cancelled():
            task.exception()
        raise cancelled
    return task.result()
