"""Runs rollouts at once and brings their trajectories together.

Owns the tasks it starts: when it returns, raises or is cancelled, none of them is left. Knows trajectories and groups;
knows nothing of models, backends or what a rollout does.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from art_core import ArtError, PendingTrajectoryGroup, RolloutError, Trajectory, TrajectoryGroup
from art_core.pending_group import close_unstarted, outcome_of
from art_core.trajectories import pending_group, read_attempt

from .collector import fewer_collections
from .leave_out import without_unsound_fields
from .progress import RolloutProgress
from .step_clock import moment, note_gathered

T = TypeVar("T")
GroupOrPending: TypeAlias = TrajectoryGroup | Awaitable[TrajectoryGroup]
AfterEachResult: TypeAlias = TrajectoryGroup | list[TrajectoryGroup] | None
AfterEach: TypeAlias = Callable[[TrajectoryGroup], AfterEachResult | Awaitable[AfterEachResult]]
SHOWN_EXCEPTIONS = 3
STARTED_AT_ONCE = 8


class RolloutsFailed(ArtError):
    """More rollouts raised than `max_exceptions` allows. `exceptions` are those seen until then, in order."""

    def __init__(self, exceptions: Sequence[BaseException | RolloutError], *, limit: str) -> None:
        self.exceptions = tuple(exceptions)
        count = len(self.exceptions)
        shown = "\n".join(_described(error) for error in self.exceptions[:SHOWN_EXCEPTIONS])
        more = f"... and {count - SHOWN_EXCEPTIONS} more" if count > SHOWN_EXCEPTIONS else ""
        super().__init__(
            f"{count} {'rollout' if count == 1 else 'rollouts'} raised, where {limit} is the limit; the others were"
            " cancelled. Mend the rollout, or allow for failures: max_exceptions takes a number, or a share between 0"
            f" and 1. What was raised:\n{shown}{more}"
        )


class _Tolerance:
    """How many rollouts may raise: a number, or a share of all."""

    def __init__(self, limit: float) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 0:
            raise ValueError(
                f"max_exceptions must be a number of at least 0, or a share between 0 and 1, not {limit!r}"
            )
        self._limit = limit
        self._seen: list[BaseException | RolloutError] = []
        self._failed: RolloutsFailed | None = None

    def count(self, error: BaseException | RolloutError, total: int) -> None:
        """Raise RolloutsFailed when this one is too many of `total` rollouts."""
        if self._failed is not None:
            raise self._failed
        self._seen.append(error)
        is_share = 0 < self._limit < 1
        if len(self._seen) > (self._limit * total if is_share else self._limit):
            of = f" of {total} rollouts" if is_share else ""
            self._failed = RolloutsFailed(self._seen, limit=f"max_exceptions={self._limit}{of}")
            first = self._seen[0]
            raise self._failed from (first if isinstance(first, BaseException) else None)


async def gather_trajectory_groups(
    groups: Iterable[GroupOrPending],
    *,
    pbar_desc: str | None = "gather",
    pbar_total_completion_tokens: bool = False,
    max_exceptions: int | float = 0,
    max_metrics: int | None = None,
    after_each: AfterEach | None = None,
) -> list[TrajectoryGroup]:
    """Run every rollout of every group at once and give the groups in the order given.

    `groups` are `TrajectoryGroup(rollouts)` of awaitables, or other awaitables of a group. A rollout that raises
    becomes one of its group's `exceptions`; more of them than `max_exceptions` (a number, or a share of all rollouts
    when between 0 and 1) raise RolloutsFailed and cancel the rest. Trajectories without policy versions get those of
    their choices. `after_each` is called with each group as it is complete, and gives the group to keep, a list of
    groups, or None to drop it; it may be a coroutine function, and its raising counts as one exception and drops the
    group.

    `pbar_desc` None shows no bar; with one, when no rollout has ended for ten seconds, the one that has run longest is
    named as `groups[3][0]`, the first of the fourth group. `max_metrics` limits how many metrics the bar shows.
    """
    given = list(groups)
    tolerance = _Tolerance(max_exceptions)
    known = sum(len(group) for group in given if isinstance(group, PendingTrajectoryGroup))
    progress = RolloutProgress(
        pbar_desc, total=known, max_metrics=max_metrics, completion_tokens=pbar_total_completion_tokens
    )
    try:
        with fewer_collections(), progress:
            kept = await _all_or_cancel(
                [
                    _finish_group(group, f"groups[{g}]", tolerance, progress, after_each)
                    for g, group in enumerate(given)
                ],
                sizes=[len(group) if isinstance(group, PendingTrajectoryGroup) else 1 for group in given],
            )
    finally:
        close_groups(given)
    return [group for each in kept for group in each]


async def gather_trajectories(
    trajectories: Iterable[Awaitable[Trajectory]],
    *,
    pbar_desc: str | None = "gather",
    pbar_total_completion_tokens: bool = False,
    max_exceptions: int | float = 0,
    max_metrics: int | None = None,
) -> list[Trajectory | BaseException]:
    """Run rollouts at once and give their trajectories in the order given, an exception where one raised.

    The other arguments are those of `gather_trajectory_groups`.
    """
    pending = pending_group(trajectories)
    tolerance = _Tolerance(max_exceptions)
    progress = RolloutProgress(
        pbar_desc, total=len(pending), max_metrics=max_metrics, completion_tokens=pbar_total_completion_tokens
    )
    try:
        with fewer_collections(), progress:
            return await _run_rollouts(pending, "trajectories", tolerance, progress)
    finally:
        pending.close()


def close_groups(groups: Iterable[GroupOrPending]) -> None:
    """Give up what has not begun of these groups."""
    for group in groups:
        if isinstance(group, PendingTrajectoryGroup):
            group.close()
        else:
            close_unstarted(group)


async def _finish_group(
    group: GroupOrPending,
    where: str,
    tolerance: _Tolerance,
    progress: RolloutProgress,
    after_each: AfterEach | None,
) -> list[TrajectoryGroup]:
    began = moment()
    if isinstance(group, PendingTrajectoryGroup):
        finished = group.group_of(await _run_rollouts(group, where, tolerance, progress))
    else:
        with progress.running(where):
            finished = _sound(await _await_group(group), where)
        progress.expect(len(finished) + len(finished.exceptions))
        for result in (*finished, *finished.exceptions):
            progress.rollout(result)
        for error in finished.exceptions:
            tolerance.count(error, progress.total)
    note_gathered(finished, began)
    if after_each is None:
        return [finished]
    with progress.running(f"after_each of {where}"):
        kept = await outcome_of(_kept(finished, after_each))
    if isinstance(kept, list):
        return kept
    progress.exceptions += 1
    tolerance.count(kept, progress.total)
    warnings.warn(f"after_each raised {RolloutError.of(kept)}; its group is left out", RuntimeWarning, stacklevel=2)
    return []


async def _await_group(group: TrajectoryGroup | Awaitable[TrajectoryGroup]) -> TrajectoryGroup:
    finished = group if isinstance(group, TrajectoryGroup) else await outcome_of(group)
    if isinstance(finished, BaseException):
        return TrajectoryGroup([finished])
    if not isinstance(finished, TrajectoryGroup):
        raise TypeError(f"an awaitable of groups must give a TrajectoryGroup, not {type(finished).__name__}")
    return finished


def _sound(group: TrajectoryGroup, where: str) -> TrajectoryGroup:
    """The group itself, or one whose unsound trajectories are exceptions, and that lacks what it can't keep itself."""
    group, left_out = without_unsound_fields(group, where)
    for problem in left_out:
        warnings.warn(f"{problem}; it is left out", RuntimeWarning, stacklevel=2)
    results = [read_attempt(trajectory) for trajectory in group]
    if all(isinstance(result, Trajectory) for result in results):
        return group
    others = {name: getattr(group, name) for name in ("exceptions", "metadata", "metrics", "logs")}
    return TrajectoryGroup(results, **others)


async def _kept(group: TrajectoryGroup, after_each: AfterEach) -> list[TrajectoryGroup]:
    kept = after_each(group)
    return _as_list(await kept if inspect.isawaitable(kept) else kept)


async def _run_rollouts(
    pending: PendingTrajectoryGroup, where: str, tolerance: _Tolerance, progress: RolloutProgress
) -> list[Trajectory | BaseException]:
    """The results in the order given; each is counted as it comes."""

    async def run(number: int, rollout: Coroutine[Any, Any, Trajectory | BaseException]) -> Trajectory | BaseException:
        with progress.running(f"{where}[{number}]"):
            result = await rollout
        progress.rollout(result)
        if isinstance(result, BaseException):
            tolerance.count(result, progress.total)
        return result

    rollouts = pending.rollouts()
    try:
        return await _all_or_cancel([run(number, rollout) for number, rollout in enumerate(rollouts)])
    finally:
        for rollout in rollouts:
            close_unstarted(rollout)


async def _all_or_cancel(work: Sequence[Coroutine[Any, Any, T]], sizes: Sequence[int] | None = None) -> list[T]:
    """Run coroutines at once. When one raises, or this is cancelled, the others are cancelled and awaited first.

    They are started a few at a time, `sizes` rollouts each, so that ten thousand do not hold the event loop at once.
    """
    tasks: list[asyncio.Task[T]] = []
    failed: list[asyncio.Task[T]] = []

    def note(task: asyncio.Task[T]) -> None:
        if not task.cancelled() and task.exception() is not None:
            failed.append(task)

    begun = 0
    try:
        for index, each in enumerate(work):
            tasks.append(asyncio.ensure_future(each))
            tasks[-1].add_done_callback(note)
            begun += 1 if sizes is None else sizes[index]
            if begun >= STARTED_AT_ONCE:
                begun = 0
                await asyncio.sleep(0)
                await asyncio.sleep(0)  # those just begun have begun their own
                if failed:
                    failed[0].result()
        # Unlike asyncio.gather, this leaves it to us to cancel them, and doesn't raise a KeyboardInterrupt again.
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if failed:
            failed[0].result()
        return [task.result() for task in tasks]
    finally:
        left = [task for task in tasks if not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        for each in work[len(tasks) :]:
            each.close()


def _as_list(kept: AfterEachResult) -> list[TrajectoryGroup]:
    groups = [] if kept is None else kept if isinstance(kept, list) else [kept]
    for group in groups:
        if not isinstance(group, TrajectoryGroup):
            raise TypeError(
                f"after_each must give a TrajectoryGroup, a list of them or None, not {type(group).__name__}"
            )
    return groups


def _described(error: BaseException | RolloutError) -> str:
    if isinstance(error, RolloutError):
        return error.traceback or str(error)
    return "".join(traceback.format_exception(error))
