"""Turns a stream of groups into batches, running the next batches while one is trained on.

Owns the batches under way: when its iterator ends, however it ends, none is left. Knows gathering, not training.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sized
from itertools import islice

from art_core import TrajectoryGroup

from .gather import GroupOrPending, close_groups, gather_trajectory_groups
from .progress import RolloutProgress


async def trajectory_group_batches(
    groups: Iterable[GroupOrPending],
    *,
    batch_size: int,
    max_batch_exceptions: int | float = 0,
    max_concurrent_batches: int = 4,
    skip_batches: int = 0,
    pbar_desc: str | None = "batches",
) -> AsyncIterator[list[TrajectoryGroup]]:
    """Yield lists of `batch_size` groups, in the order given; the last may be shorter.

    Up to `max_concurrent_batches` run at once, the one just yielded among them while its consumer works. The first
    `skip_batches` batches are never run, which is how a resumed job goes on. More than `max_batch_exceptions` rollouts
    of a batch that raise (a number, or a share) end the iteration with RolloutsFailed.
    """
    if batch_size < 1 or max_concurrent_batches < 1 or skip_batches < 0:
        raise ValueError("batch_size and max_concurrent_batches must be at least 1, skip_batches at least 0")
    batches = _batches(iter(groups), batch_size)
    for skipped in islice(batches, skip_batches):
        close_groups(skipped)
    running: deque[tuple[list[GroupOrPending], asyncio.Task[list[TrajectoryGroup]]]] = deque()
    total = -(-len(groups) // batch_size) - skip_batches if isinstance(groups, Sized) else 0
    with RolloutProgress(pbar_desc, total=total) as progress:
        first = skip_batches
        try:
            while True:
                for batch in islice(batches, max_concurrent_batches - len(running)):
                    gathering = gather_trajectory_groups(batch, pbar_desc=None, max_exceptions=max_batch_exceptions)
                    running.append((batch, asyncio.ensure_future(gathering)))
                if not running:
                    return
                with progress.running(f"batch {first}"):
                    finished = await running[0][1]
                first += 1
                progress.batch(finished)
                yield finished
                running.popleft()
        finally:
            for _, task in running:
                task.cancel()
            await asyncio.gather(*(task for _, task in running), return_exceptions=True)
            for batch, _ in running:
                close_groups(batch)


def _batches(groups: Iterator[GroupOrPending], size: int) -> Iterator[list[GroupOrPending]]:
    while batch := list(islice(groups, size)):
        yield batch
