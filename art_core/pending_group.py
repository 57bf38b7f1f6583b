"""A group whose trajectories are still being made: runs the attempts, each guarded from the others.

Knows tasks and cancellation; what a trajectory is, `trajectories` knows.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .trajectories import Trajectory, TrajectoryGroup

T = TypeVar("T")


class PendingTrajectoryGroup:
    """A group whose trajectories are still being made. Awaiting it runs them all at once.

    Nothing runs before it is awaited. When the awaiting task is cancelled, so are the attempts. `read` turns what an
    attempt gave into its trajectory, or into the error that it isn't one; `group_of` makes the finished group.
    """

    def __init__(
        self,
        items: Sequence[Any],
        *,
        read: Callable[[Any], Trajectory | BaseException],
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
        return self._read(await outcome_of(item) if isinstance(item, Awaitable) else item)


async def outcome_of(awaitable: Awaitable[T]) -> T | BaseException:
    """What an awaitable gives, or whatever it raised; only KeyboardInterrupt is raised here, and our own cancellation.

    It runs in a task of its own, so that one that cancels the task it runs in doesn't cancel ours.
    """
    try:
        return await asyncio.ensure_future(_caught(awaitable))
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return error


async def _caught(awaitable: Awaitable[T]) -> T | BaseException:
    try:
        return await awaitable
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise
    except BaseException as error:
        return error


def close_unstarted(item: object) -> None:
    """Close a coroutine that was made and has not begun; anything else is left alone."""
    if inspect.iscoroutine(item) and inspect.getcoroutinestate(item) == inspect.CORO_CREATED:
        item.close()
