"""The checkpoints of a model as the service lists them, and which step a job made where it doesn't say.

Knows pages; trains and publishes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from art_core.errors import TrainingFailed

from . import wire
from .service import Connection, Patience

#: A step may be listed a little after the job's last event.
LISTED_WITHIN_S = 120.0
_PAGE = 100


async def list_checkpoints(connection: Connection, model_id: str) -> list[int]:
    """Every step, oldest first."""
    steps: list[int] = []
    after: str | None = None
    while True:
        page = await _page(connection, model_id, wire.PageQuery(after=after, limit=_PAGE, order="asc"))
        fresh = [checkpoint.step for checkpoint in page.data if checkpoint.step not in steps]
        steps += fresh
        # Only an empty page is surely the last where the service doesn't say; one that repeats itself ends it too.
        if page.has_more is False or not fresh:
            return sorted(steps)
        after = page.data[-1].id


async def latest_step(connection: Connection, model_id: str) -> int | None:
    """The latest step, None where no checkpoint is listed."""
    page = await _page(connection, model_id, wire.PageQuery(limit=1, order="desc"))
    return max((checkpoint.step for checkpoint in page.data), default=None)


async def step_after(connection: Connection, model_id: str, before: int, job_id: str, patience: Patience) -> int:
    """The step that came after `before`, once it is listed. Raises TrainingFailed when none comes."""
    deadline = time.monotonic() + LISTED_WITHIN_S
    attempt = 0
    while True:
        latest = await latest_step(connection, model_id)
        if latest is not None and latest > before:
            return latest
        attempt += 1
        pause_s = patience.pause(attempt)
        if time.monotonic() + pause_s > deadline:
            raise TrainingFailed(
                f"The training job {job_id} ended well, but no checkpoint after step {before} was listed within"
                f" {LISTED_WITHIN_S:g} s. It may come later; model.get_step() will tell."
            )
        await asyncio.sleep(pause_s)


async def delete(connection: Connection, model_id: str, steps: Sequence[int]) -> list[int]:
    """Delete steps; gives those that were there."""
    if not steps:
        return []
    answer = await connection.delete(
        wire.CHECKPOINTS.format(model_id=model_id),
        wire.DeletedCheckpoints,
        doing=f"deleting the checkpoints of {', '.join(map(str, steps))}",
        body=wire.DeleteCheckpoints(steps=list(steps)),
    )
    return [step for step in steps if step not in answer.not_found_steps]


async def _page(connection: Connection, model_id: str, query: wire.PageQuery) -> wire.CheckpointPage:
    return await connection.get(
        wire.CHECKPOINTS.format(model_id=model_id), wire.CheckpointPage, doing="asking for checkpoints", query=query
    )
