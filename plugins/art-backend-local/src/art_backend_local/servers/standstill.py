"""Notices a server process that runs but does nothing any more, as one that was stopped or hangs: it answers no health
check.

Knows only whether it answered; what becomes of the process is its owner's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

EVERY_S = 15.0
TIMEOUT_S = 20.0
# Busy ones may be late once.
SILENT_LIMIT = 3


def limit_s() -> float:
    """How long a process may stand still, at most, before it is noticed."""
    return SILENT_LIMIT * (EVERY_S + TIMEOUT_S)


async def stands_still(answers: Callable[[], Awaitable[bool]]) -> None:
    """Return once several health checks in a row were not answered. `answers` asks, for `TIMEOUT_S` seconds at most."""
    silent = 0
    while silent < SILENT_LIMIT:
        await asyncio.sleep(EVERY_S)
        silent = 0 if await answers() else silent + 1
