"""Evaluations beside training: each on a lease of its own, logged at the step that it measured.

Knows the user's evaluation function and when one is due; knows no rollout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from art_core import RolloutError, Trajectory, TrajectoryGroup

from ..step_clock import moment
from .retention import CHECKPOINT_EVAL_COMPLETED_METRIC
from .rollout_functions import EvalFn
from .run import Run


@dataclass
class Evals:
    """The evaluations of one run; `last` is the step of the last one that began, `awaited` are those not yet done."""

    run: Run
    eval_fn: EvalFn | None
    tasks: asyncio.TaskGroup
    last: int = 0
    completed: set[int] = field(default_factory=set)
    awaited: set[int] = field(default_factory=set)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _begun: list[asyncio.Task[None]] = field(default_factory=list)

    def is_due(self, step: int) -> bool:
        """True when this step is to be evaluated."""
        every = self.run.settings.eval_every_n_steps
        return self.eval_fn is not None and every > 0 and step - self.last >= every

    def begin(self, step: int) -> None:
        """Evaluate a step, after those that wait before it."""
        if self.eval_fn is not None:
            self.last = step
            self.awaited.add(step)
            self._begun.append(self.tasks.create_task(self._evaluate(self.eval_fn, step)))

    def cancel(self) -> None:
        """Give up what is not done; a later run takes it up again."""
        for task in self._begun:
            task.cancel()

    async def _evaluate(self, eval_fn: EvalFn, step: int) -> None:
        run = self.run
        try:
            # The lease comes before the turn, so that the step is still there when its turn comes.
            async with run.leased(step, pin=True), self._turn:
                run.status.evals += 1
                run.status.does("eval", f"evaluating step {step}")
                began = moment()
                try:
                    found = await eval_fn(run.model, step, run.config)
                    splits = found if isinstance(found, Mapping) else {"val": found}
                    for split, evaluated in splits.items():
                        groups = _as_groups(evaluated)
                        timed = {"time/step_eval_s": moment() - began, CHECKPOINT_EVAL_COMPLETED_METRIC: 1.0}
                        await run.model.log(groups, split, metrics=timed, step=step)
                        rewards = [trajectory.reward for group in groups for trajectory in group]
                        if rewards:
                            run.status.val_reward = fmean(rewards)
                    self.completed.add(step)
                    run.status.progress()
                    run.status.does("eval", f"evaluated step {step}")
                finally:
                    run.status.evals -= 1
        except Exception as error:
            run.status.say(f"the evaluation of step {step} failed: {RolloutError.of(error)}")
        finally:
            self.awaited.discard(step)
            run.changed()


def _as_groups(evaluated: Any) -> list[TrajectoryGroup]:
    given = list(evaluated)
    groups = [each for each in given if isinstance(each, TrajectoryGroup)]
    loose = [each for each in given if isinstance(each, Trajectory | BaseException)]
    return [*groups, TrajectoryGroup(loose)] if loose else groups
