"""What the user's functions look like, and a group made of single attempts. Knows nothing of training."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from art_core import Trajectory, TrajectoryGroup

from ..model import TrainableModel

ScenarioT = TypeVar("ScenarioT", bound=Mapping[str, Any])

RolloutFn: TypeAlias = Callable[[TrainableModel, ScenarioT, Any], Awaitable[TrajectoryGroup]]
SingleRolloutFn: TypeAlias = Callable[[TrainableModel, ScenarioT, Any], Awaitable[Trajectory]]
Evaluated: TypeAlias = Sequence[Trajectory] | Sequence[TrajectoryGroup]
EvalFn: TypeAlias = Callable[[TrainableModel, int, Any], Awaitable[Evaluated | Mapping[str, Evaluated]]]


def make_group_rollout_fn(single: SingleRolloutFn[ScenarioT], n: int = 4) -> RolloutFn[ScenarioT]:
    """A rollout function that runs `single` n times at once; what an attempt raises goes into the group."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a whole number of at least 1, not {n!r}")

    async def rollout_group(model: TrainableModel, scenario: ScenarioT, config: Any) -> TrajectoryGroup:
        async with asyncio.TaskGroup() as tasks:
            attempts = [tasks.create_task(_attempt(single, model, scenario, config)) for _ in range(n)]
        return TrajectoryGroup([attempt.result() for attempt in attempts])

    return rollout_group


async def _attempt(
    single: SingleRolloutFn[ScenarioT], model: TrainableModel, scenario: ScenarioT, config: Any
) -> Trajectory | Exception:
    try:
        return await single(model, scenario, config)
    except Exception as error:
        return error
