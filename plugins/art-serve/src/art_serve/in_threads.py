"""Runs what blocks, such as a transaction, in threads of its own, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from sqlalchemy import Engine

P = ParamSpec("P")
T = TypeVar("T")
# One writes at a time anyway; the others read.
_THREADS = 4


class Transactions:
    """`await transactions(function, ...)` calls `function(engine, ...)` in a thread. Closing waits for what is under
    way.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="database")

    async def __call__(self, function: Callable[Concatenate[Engine, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function gives or raises."""
        call = partial(function, self.engine, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """End the threads and the connections."""
        self._pool.shutdown(wait=True)
        self.engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await asyncio.to_thread(self.close)
