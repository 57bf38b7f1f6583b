"""Groups of attempts: finished, pending, failing and cancelled."""

from __future__ import annotations

import asyncio
import copy
import gc
import math
import warnings
from collections.abc import Awaitable
from typing import Any

import pytest
from openai.types.chat.chat_completion import ChatCompletion, Choice
from pydantic import ValidationError

from art_core import PendingTrajectoryGroup, Trajectory, TrajectoryGroup, check_groups
from art_core.errors import InvalidTrajectory


async def rollout(reward: float, after: Awaitable[Any] | None = None) -> Trajectory:
    if after is not None:
        await after
    return Trajectory(reward=reward)


def test_a_group_can_be_read_like_a_list() -> None:
    group = TrajectoryGroup((Trajectory(reward=r) for r in (1, 2)), metadata={"scenario": 3}, logs=["a"])
    assert len(group) == 2
    assert [t.reward for t in group] == [1, 2]
    assert group[1].reward == 2
    assert group.metadata == {"scenario": 3}
    group.log("b")
    assert group.logs == ["a", "b"]
    assert len(copy.copy(group)) == 2
    assert len(TrajectoryGroup([])) == 0
    assert len(TrajectoryGroup()) == 0


def test_exceptions_are_kept_as_text_with_their_traceback() -> None:
    try:
        raise LookupError("no such tool")
    except LookupError as error:
        group = TrajectoryGroup([Trajectory(), error], exceptions=[ValueError("given")])
    assert [str(e) for e in group.exceptions] == ["LookupError: no such tool", "ValueError: given"]
    assert "test_exceptions_are_kept" in group.exceptions[0].traceback


@pytest.mark.parametrize("item", [1, "text", None, {"reward": "high"}])
def test_what_is_no_trajectory_is_refused(item: Any) -> None:
    with pytest.raises(ValidationError, match=r"trajectories\.0"):
        TrajectoryGroup([item])


async def test_awaitables_give_a_pending_group_that_runs_when_awaited() -> None:
    started = []

    async def attempt(reward: float) -> Trajectory:
        started.append(reward)
        return Trajectory(reward=reward)

    pending = TrajectoryGroup((attempt(r) for r in (3, 1, 2)), metadata={"scenario": "x"})
    assert isinstance(pending, PendingTrajectoryGroup)
    assert len(pending) == 3
    await asyncio.sleep(0)
    assert started == []
    group = await pending
    assert isinstance(group, TrajectoryGroup)
    assert [t.reward for t in group] == [3, 1, 2]
    assert group.metadata == {"scenario": "x"}


async def test_finished_and_pending_attempts_mix_and_errors_become_exceptions() -> None:
    async def fails() -> Trajectory:
        raise RuntimeError("the tool is down")

    async def gives_text() -> Trajectory:
        return "oops"  # type: ignore[return-value]

    items: list[Any] = [Trajectory(reward=1), rollout(2), fails(), gives_text(), ValueError("before")]
    group: TrajectoryGroup = await TrajectoryGroup(items)  # type: ignore[misc]
    assert [t.reward for t in group] == [1, 2]
    assert [str(e) for e in group.exceptions] == [
        "RuntimeError: the tool is down",
        "TypeError: a rollout must return a Trajectory, not str",
        "ValueError: before",
    ]


async def test_completed_gives_attempts_as_they_end() -> None:
    gates = [asyncio.Event() for _ in range(3)]
    pending = TrajectoryGroup([rollout(i, gate.wait()) for i, gate in enumerate(gates)])
    ended = []
    for_whom = {2: 0, 0: 1, 1: None}
    gates[2].set()
    async for result in pending.completed():
        assert isinstance(result, Trajectory)
        ended.append(int(result.reward))
        following = for_whom[int(result.reward)]
        if following is not None:
            gates[following].set()
    assert ended == [2, 0, 1]


async def test_cancelling_leaves_no_task_and_every_attempt_sees_it() -> None:
    ended = []
    running = asyncio.Event()

    async def attempt(n: int) -> Trajectory:
        try:
            if n == 2:
                running.set()
            await asyncio.Event().wait()
        finally:
            ended.append(n)
        return Trajectory()

    async def gather() -> TrajectoryGroup:
        return await TrajectoryGroup([attempt(n) for n in range(3)])

    before = asyncio.all_tasks()
    task = asyncio.create_task(gather())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == [0, 1, 2]
    assert asyncio.all_tasks() == before


async def test_an_attempt_cancelled_by_its_own_doing_is_one_exception_and_no_more() -> None:
    async def cancels_itself() -> Trajectory:
        inner = asyncio.create_task(asyncio.sleep(60))
        inner.cancel()
        await inner
        return Trajectory()

    group = await TrajectoryGroup([rollout(1), cancels_itself()])
    assert [t.reward for t in group] == [1]
    assert [e.type for e in group.exceptions] == ["CancelledError"]


@pytest.mark.slow
async def test_attempts_cancelled_before_they_began_are_closed() -> None:
    async def gather() -> TrajectoryGroup:
        return await TrajectoryGroup([rollout(1), rollout(2)])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = asyncio.create_task(gather())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_bad_groups_are_named_by_their_position() -> None:
    good = TrajectoryGroup([Trajectory(reward=1), Trajectory(reward=0)])
    check_groups([good, TrajectoryGroup([]), TrajectoryGroup([Trajectory(), Trajectory()])])
    with pytest.raises(InvalidTrajectory, match=r"trajectory_groups\[1\] is a list, not a TrajectoryGroup"):
        check_groups([good, [Trajectory()]])  # type: ignore[list-item]
    for reward in (math.nan, math.inf, -math.inf):
        with pytest.raises(InvalidTrajectory, match=r"trajectory_groups\[1\]\.trajectories\[1\]\.reward is "):
            check_groups([good, TrajectoryGroup([Trajectory(), Trajectory(reward=reward)])])


async def test_a_pending_group_is_refused_with_what_to_do() -> None:
    pending: Any = TrajectoryGroup([rollout(1)])
    with pytest.raises(InvalidTrajectory, match="still pending; await it"):
        check_groups([pending])
    await pending


def test_an_appended_item_that_is_no_choice_is_named_by_its_position() -> None:
    completion = ChatCompletion.construct(
        id="c", choices=[Choice.construct(index=0, finish_reason="stop", message={"role": "assistant", "content": ""})]
    )
    trajectory = Trajectory(messages_and_choices=[{"role": "user", "content": "hi"}])
    trajectory.messages_and_choices.append(completion)  # type: ignore[arg-type]
    with pytest.raises(
        InvalidTrajectory,
        match=r"trajectory_groups\[0\]\.trajectories\[0\]: item 1 .* ChatCompletion; append `chat_completion\.choices",
    ):
        check_groups([TrajectoryGroup([trajectory])])
