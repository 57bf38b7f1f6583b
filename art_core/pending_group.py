"""A group whose trajectories are still being made: runs the attempts, each guarded from the others.

Knows tasks and cancellation; what a trajectory is, `trajectories` knows.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trajectories import Trajectory, TrajectoryGroup


class PendingTrajectoryGroup:
    """A group whose trajectories are still being made. Awaiting it runs them all at once.

    Nothing runs before it is awaited. When the awaiting task is cancelled, so are the attempts. `read` turns what an
    attempt returned into its trajectory, or into the error that it isn't one; `group_of` makes the finished group.
    """

    def __init__(
        self,
        items: Sequence[Any],
        *,
        read: Callable[[Any], Trajectory | Exception],
        group_of: Callable[[Iterable[Trajectory | BaseException]], TrajectoryGroup],
    ) -> None:
        self._items = list(items)
        self._read = read
        self.group_of = group_of

    def __len__(self) -> int:
        return len(self._items)

    def __await__(self) -> Generator[Any, None, TrajectoryGroup]:
        return self._collect().__await__()

    async def _collect(self) -> TrajectoryGroup:
        results: list[Trajectory | BaseException] = [item async for item in self.completed(return_in_order=True)]
        return self.group_of(results)

    def rollouts(self) -> list[Coroutine[Any, Any, Trajectory | BaseException]]:
        """Each attempt as a coroutine that gives its trajectory, or the exception that it raised."""
        return [self._guarded(item) for item in self._items]

    def close(self) -> None:
        """Give up the attempts that have not begun, so that none is reported as never awaited."""
        for item in self._items:
            close_unstarted(item)

    async def completed(self, *, return_in_order: bool = False) -> AsyncIterator[Trajectory | BaseException]:
        """Yield each attempt's trajectory or exception as it ends, or in the order given."""
        tasks = [asyncio.ensure_future(rollout) for rollout in self.rollouts()]
        try:
            for next_result in tasks if return_in_order else asyncio.as_completed(tasks):
                yield await next_result
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()

    async def _guarded(self, item: Any) -> Trajectory | BaseException:
        if not isinstance(item, Awaitable):
            result: Trajectory | BaseException = item
            return result
        try:
            return self._read(await item)
        except Exception as error:
            return error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return error  # something within the attempt was cancelled, not the attempt


def close_unstarted(item: object) -> None:
    """Close a coroutine that was made and has not begun; anything else is left alone."""
    if inspect.iscoroutine(item) and inspect.getcoroutinestate(item) == inspect.CORO_CREATED:
        item.close()
