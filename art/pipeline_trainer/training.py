"""Takes batches, has the backend train them, and says and keeps what came of it.

Knows the flow's batches and the backend's public calls; starts no rollout.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from art_core import BackendCapability, ModelKey, TrainResult
from art_core.errors import CheckpointInUse
from art_core.history import HISTORY

from ..policy_age import AGE, mean_age
from ..step_clock import moment
from .evals import Evals
from .flow import ReadyGroup
from .retention import (
    CHECKPOINT_CREATED_AT_METRIC,
    CHECKPOINT_SAVED_METRIC,
    CheckpointRetentionContext,
    CheckpointRetentionStrategy,
    checkpoints_of,
)
from .run import Run

LOGGED_ASIDE = 50


@dataclass
class Training:
    """The steps of one run. `options` are those of `backend.train` that stay the same."""

    run: Run
    options: Mapping[str, Any]
    save_checkpoint: bool
    retention: CheckpointRetentionStrategy | None
    evals: Evals
    cumulative: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    async def until_done(self) -> str:
        """Train until there is nothing more, and give the reason in words."""
        run, settings = self.run, self.run.settings
        last = moment()
        while settings.max_steps is None or self.steps < settings.max_steps:
            run.status.does("trainer", "waiting for a batch")
            await run.until(lambda: run.stop_after_step or self._collapsed() or self._may_go_on())
            if run.stop_after_step:
                return "it was asked to stop; finished groups wait in the model's folder for the next run"
            if self._collapsed():
                return (
                    f"model collapse: {len(run.aside)} groups since the last step had rewards that are all equal, so"
                    " there is nothing to learn from them. Look at the rollouts, or raise discard_queue_multiplier"
                )
            if stale := run.flow.drop_stale():
                run.status.counts.stale += len(stale)
                await run.kept.gone([each.scenario for each in stale], run.status.counts.as_dict())
                run.changed()
            elif run.flow.may_take(no_more=run.no_more):
                waited_s = moment() - last
                await self._step(waited_s)
                last = moment()
            elif self._done():
                return "it was asked to stop" if run.stopping else "every scenario is done"
        return f"max_steps={settings.max_steps} is reached"

    def _done(self) -> bool:
        return self.run.no_more and not self.run.flow.running and not self.run.flow.ready

    def _may_go_on(self) -> bool:
        return self.run.flow.may_take(no_more=self.run.no_more) or self._done()

    def _collapsed(self) -> bool:
        settings = self.run.settings
        return len(self.run.aside) >= settings.discard_queue_multiplier * settings.min_batch_size

    async def _step(self, waited_s: float) -> None:
        run, flow = self.run, self.run.flow
        batch, taken_at, before = flow.take(), moment(), flow.version
        queued_s = sum(taken_at - run.ready_at.pop(each.scenario, taken_at) for each in batch)
        run.changed()
        run.status.does("trainer", f"training {len(batch)} groups from step {before}")
        await run.kept.taken([each.scenario for each in batch], before)
        due = self.evals.is_due(before + 1)
        groups = [each.group for each in batch]
        result = await run.backend.train(
            run.model, groups, **self.options, save_checkpoint=self.save_checkpoint and due
        )
        trainer_s = moment() - taken_at
        flow.trained(result.step)
        self.steps += 1
        run.status.counts.trained += len(batch)
        run.status.progress()
        if run.settings.late_rollouts == "cancel":
            for scenario in flow.too_old():
                run.too_old.add(scenario)
                run.rollouts[scenario].cancel()
        if due:
            self.evals.begin(result.step)
        run.changed()
        run.status.does("trainer", f"logging step {result.step}")
        rewards = [trajectory.reward for group in groups for trajectory in group]
        run.status.stepped(fmean(rewards) if rewards else None, trainer_s)
        metrics = self._metrics(batch, result, waited_s=waited_s, trainer_s=trainer_s, queued_s=queued_s)
        await run.model.log(groups, metrics=metrics, step=result.step, split="train")
        aside, run.aside[:] = run.aside[:LOGGED_ASIDE], []
        if aside:
            await run.model.log(aside, step=result.step, split="discarded")
        if self.retention is not None and self.steps % run.settings.checkpoint_retention_interval == 0:
            await self._retain(result.step)
        done = [each.scenario for each in batch]
        await run.kept.gone(done, run.status.counts.as_dict(), skipped=flow.skipped)
        await self.save_state()

    def _metrics(
        self,
        batch: tuple[ReadyGroup, ...],
        result: TrainResult,
        *,
        waited_s: float,
        trainer_s: float,
        queued_s: float,
    ) -> dict[str, float]:
        counts, flow = self.run.status.counts, self.run.flow

        def age_before(version: int) -> int:
            return flow.age(version) - 1

        metrics = {
            "train/steps_off_policy": fmean(flow.age(each.version) for each in batch),
            "train/discarded_stale_groups": float(counts.stale),
            "discarded/cum/stale_groups": float(counts.stale),
            "discarded/cum/zero_variance_groups": float(counts.zero_variance),
            "discarded/cum/errored_scenarios": float(counts.errored),
            AGE: fmean(mean_age(each.group, age_before) for each in batch),
            "queue/ready_groups": float(len(flow.ready)),
            "queue/running_rollouts": float(len(flow.running)),
            "time/step_wall_s": waited_s + trainer_s,
            "time/step_trainer_s": trainer_s,
            "time/step_actor_s": sum(each.actor_s for each in batch),
            "throughput/step_trainer_idle_s": waited_s,
            "throughput/step_actor_idle_s": queued_s,
            CHECKPOINT_SAVED_METRIC: 1.0,
            CHECKPOINT_CREATED_AT_METRIC: time.time(),
        } | result.metrics
        for name, value in list(metrics.items()):
            section, _, rest = name.partition("/")
            if section in ("costs", "time", "data") and rest.startswith("step_"):
                total = f"{section}/cum/{rest.removeprefix('step_')}"
                self.cumulative[total] = self.cumulative.get(total, 0.0) + value
                metrics[total] = self.cumulative[total]
        return metrics

    async def _retain(self, step: int) -> None:
        run = self.run
        if self.retention is None or BackendCapability.DELETE_CHECKPOINTS not in run.backend.capabilities_for(
            run.model
        ):
            return
        folder = ModelKey(run.model.project, run.model.name).folder(Path(run.model.base_path))
        # A rollout that has begun may hold its step only in a moment.
        held = {step, *run.leases.steps, *run.flow.running.values(), *self.evals.awaited}
        offered = [each for each in await run.backend.list_steps(run.model) if each not in held]
        found = await asyncio.to_thread(checkpoints_of, folder / HISTORY, offered, folder / "checkpoints")
        keep = set(self.retention(CheckpointRetentionContext(current_step=step, checkpoints=found)))
        for each in sorted(set(offered) - keep):
            try:
                await run.backend.delete_checkpoints(run.model, [each])
            except CheckpointInUse:
                continue  # it is offered again after a later step

    async def save_state(self) -> None:
        """The model's state.json, under the keys of a pipeline."""
        run = self.run
        state = {
            "_pipeline_trainer": {
                "scenario_offset": run.source.handed_out,
                "total_scenarios_consumed": run.source.handed_out,
                "training_step": run.flow.version,
                "last_eval_step": self.evals.last,
                "completed_eval_steps": sorted(self.evals.completed),
            },
            "_metrics_builder_state": {"cum_state": self.cumulative, "unique_scenario_ids": []},
        }
        await asyncio.to_thread(run.model.merge_state, state)
