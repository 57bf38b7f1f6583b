"""Hands scenarios to rollouts as they are admitted, and keeps what they give.

Knows the flow's admission, not what is trained when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from art_core import ArtError, RolloutError, TrajectoryGroup

from ..leave_out import without_unsound_fields
from ..step_clock import moment, note_gathered
from .flow import ReadyGroup
from .off_policy import has_no_variance, oldest_version
from .rollout_functions import RolloutFn
from .run import Run


class RolloutsKeepFailing(ArtError):
    """Rollout after rollout failed, with no group between them."""


class Rollouts:
    """The rollouts of one run."""

    def __init__(self, run: Run, rollout_fn: RolloutFn[Any]) -> None:
        self._run, self._rollout_fn = run, rollout_fn
        self._failures_in_a_row = 0

    async def hand_out(self) -> None:
        """Begin rollouts until cancelled, or until the pipeline stops. Raises ScenarioSourceFailed and
        RolloutsKeepFailing.
        """
        run = self._run
        async with asyncio.TaskGroup() as tasks:
            while True:
                run.status.does("scenarios", "waiting to begin a rollout")
                await run.until(lambda: run.stopping or (not run.source.ended and run.flow.may_begin()))
                if run.stopping:
                    break
                run.status.does("scenarios", "waiting for the source's next scenario")
                given = await run.source.next()
                if given is None or run.stopping:
                    run.changed()
                    continue
                number, scenario = given
                version = run.flow.version
                run.flow.begin(number, version)
                task = tasks.create_task(self._attempt(number, scenario, version))
                run.rollouts[number] = task

    async def _attempt(self, number: int, scenario: Any, version: int) -> None:
        run = self._run
        finished: ReadyGroup | None = None
        attempts = run.source.attempts.get(number, 0)
        try:
            # Not how far the source is: what was handed out after this one may not be written down yet.
            await run.kept.handed_out(number, attempts, number + 1)
            try:
                finished = await self._group(number, scenario, version)
            except Exception as error:
                await self._failed(number, scenario, error)
        except asyncio.CancelledError:
            if number not in run.too_old:
                raise
            run.status.counts.stale += 1
            await run.kept.finished(number)
        finally:
            run.too_old.discard(number)
            run.rollouts.pop(number, None)
            run.flow.end(number, finished)
            run.changed()

    async def _group(self, number: int, scenario: Any, version: int) -> ReadyGroup | None:
        """The group of a rollout, kept; None for one that has nothing to learn from. Raises what the rollout raised."""
        run = self._run
        began = moment()
        pinned = run.settings.update == "pinned"
        async with asyncio.timeout(run.settings.rollout_timeout_seconds), run.leased(version, pin=pinned):
            group = await self._rollout_fn(run.model, scenario, run.config)
        if not isinstance(group, TrajectoryGroup):
            raise TypeError(
                f"a rollout function must return a TrajectoryGroup, not {type(group).__name__}; make_group_rollout_fn"
                " makes one of a function that returns a Trajectory"
            )
        if not len(group):
            said = "; ".join(str(error) for error in group.exceptions) or "it holds no trajectory"
            raise ArtError(f"the group of scenario {number} can't be trained on: {said}")
        note_gathered(group, began)
        group, _ = without_unsound_fields(group, f"scenario {number}")
        _take_over_metadata(group, scenario)
        for trajectory in group:
            trajectory.stamp_policy_versions()
            if trajectory.initial_policy_version is None:
                trajectory.initial_policy_version = version
            if trajectory.final_policy_version is None:
                trajectory.final_policy_version = version if pinned else run.flow.version
        self._failures_in_a_row = 0
        run.status.progress()
        run.status.does("rollouts", f"finished scenario {number}")
        if has_no_variance(group):
            run.status.counts.zero_variance += 1
            run.aside.append(group)
            await run.kept.finished(number)
            return None
        oldest, actor_s = oldest_version(group, version), moment() - began
        await run.kept.finished(number, oldest, actor_s, group)
        run.ready_at[number] = moment()
        return ReadyGroup(number, oldest, group, actor_s)

    async def _failed(self, number: int, scenario: Any, error: Exception) -> None:
        run, limits = self._run, self._run.settings
        self._failures_in_a_row += 1
        in_a_row = self._failures_in_a_row
        attempts = run.source.attempts[number] = run.source.attempts.get(number, 0) + 1
        said = str(RolloutError.of(error))
        run.status.last_error = said
        run.status.does("rollouts", f"failed scenario {number}")
        if attempts < limits.max_attempts:
            run.status.counts.retried += 1
            await run.kept.handed_out(number, attempts, number + 1)
            run.source.again(number, scenario)
        else:
            run.status.counts.errored += 1
            await run.kept.finished(number)
            run.status.say(f"scenario {number} failed {attempts} times and is left out: {said}")
        # Those that fail while the run ends have nothing to add.
        if in_a_row == limits.max_failures_in_a_row:
            raise RolloutsKeepFailing(
                f"{in_a_row} rollouts in a row failed, so the run ends; the last one: {said}. What was"
                " finished before is kept: mend the rollout function or the endpoint, and run again."
            ) from error


def _take_over_metadata(group: TrajectoryGroup, scenario: Any) -> None:
    metadata = scenario.get("metadata") if isinstance(scenario, Mapping) else None
    for key, value in metadata.items() if isinstance(metadata, Mapping) else ():
        if isinstance(value, str | int | float | bool):
            group.metadata["scenario_id" if key == "scenario_id" else f"scenario_{key}"] = value
