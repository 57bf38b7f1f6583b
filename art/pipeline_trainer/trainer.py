"""PipelineTrainer: wires scenarios, rollouts, training, evaluation and status into one run, and ends it well.

Knows the Backend protocol and the client's own parts, and no backend.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal

from art_core import Backend, BackendCapability, ModelKey

from ..collector import fewer_collections
from ..model import TrainableModel
from .evals import Evals
from .flow import Flow, ReadyGroup
from .kept_state import Kept, KeptState
from .retention import CheckpointRetentionStrategy, KeepRecentAndTop
from .rollout_functions import EvalFn, RolloutFn, ScenarioT
from .rollouts import Rollouts
from .run import Run
from .scenario_source import ScenarioSource
from .settings import Late, PipelineSettings, Update
from .signals import on_signals
from .status import Counts, StatusReporter
from .step_leases import StepLeases
from .step_progress import step_progress
from .training import Training

HOW_TO_GO_DEDICATED = (
    "PipelineTrainer needs a backend that answers while a step trains. A LocalBackend whose training and inference"
    " share a GPU takes turns: give each its own with TrainableModel(..., _internal_config=InternalModelConfig("
    "trainer_gpu_ids=[0], inference_gpu_ids=[1])), or, on a CPU, use an inference engine that declares"
    ' concurrent_training, such as LocalBackend(inference_engine="torch").'
)


class PipelineTrainer(Generic[ScenarioT]):
    """Goes on with rollouts while a step trains.

    `rollout_fn(model, scenario, config)` gives a group. Each rollout holds the step that it began with, and its
    requests for the model's name go there (`update="pinned"`), or to the newest step (`"in_flight"`). Nothing is
    trained that is older than `max_steps_off_policy` steps; a step waits for a rollout that would be
    (`late_rollouts="wait"`), or lets it grow too old and be discarded (`"discard"`), or ends it (`"cancel"`).
    `limit_mean_steps_off_policy` drops a group whose tokens are older in the mean. A rollout that fails, or takes
    longer than `rollout_timeout_seconds`, is tried again up to `max_attempts` times in all; `max_failures_in_a_row`
    end the run. After `stall_limit_seconds` without progress a stall is named. `eval_fn(model, step, config)` is run
    beside training every `eval_every_n_steps` steps (0: never).

    `resume` goes on after an earlier run of the model: with its finished groups, its unfinished scenarios, and those
    not yet handed out, for which `scenarios` must give the same ones in the same order. `max_steps` counts from the
    call of `train`. Raises ValueError for a value out of range and for a backend that can't serve while it trains.
    """

    def __init__(
        self,
        model: TrainableModel,
        backend: Backend,
        rollout_fn: RolloutFn[ScenarioT],
        scenarios: Iterable[ScenarioT] | AsyncIterable[ScenarioT],
        config: Any = None,
        eval_fn: EvalFn | None = None,
        *,
        num_rollout_workers: int = 16,
        min_batch_size: int = 4,
        max_batch_size: int | None = None,
        max_steps_off_policy: int = 4,
        queue_maxsize: int | None = None,
        learning_rate: float = 1e-5,
        loss_fn: Literal["cispo", "ppo"] = "cispo",
        loss_fn_config: Mapping[str, Any] | None = None,
        normalize_advantages: bool = True,
        adam_params: Any = None,
        packed_sequence_length: int | None = None,
        max_steps: int | None = None,
        discard_queue_multiplier: int = 100,
        log_interval_seconds: float = 60.0,
        status_ewa_alpha: float = 0.2,
        total_scenarios: int | None = None,
        eval_every_n_steps: int = 20,
        eval_at_start: bool = True,
        save_checkpoint: bool = True,
        checkpoint_retention_strategy: CheckpointRetentionStrategy | None = None,
        checkpoint_retention_interval: int = 1,
        resume: bool = True,
        update: Update = "pinned",
        late_rollouts: Late = "wait",
        limit_mean_steps_off_policy: float | None = None,
        rollout_timeout_seconds: float | None = None,
        max_attempts: int = 3,
        max_failures_in_a_row: int = 32,
        stall_limit_seconds: float = 600.0,
    ) -> None:
        largest = 10 * min_batch_size if max_batch_size is None else max_batch_size
        self._settings = PipelineSettings(
            num_rollout_workers=num_rollout_workers,
            min_batch_size=min_batch_size,
            max_batch_size=largest,
            max_steps_off_policy=max_steps_off_policy,
            queue_maxsize=max(1, max_steps_off_policy * largest) if queue_maxsize is None else queue_maxsize,
            limit_mean_steps_off_policy=limit_mean_steps_off_policy,
            late_rollouts=late_rollouts,
            update=update,
            max_steps=max_steps,
            discard_queue_multiplier=discard_queue_multiplier,
            log_interval_seconds=log_interval_seconds,
            stall_limit_seconds=stall_limit_seconds,
            rollout_timeout_seconds=rollout_timeout_seconds,
            max_attempts=max_attempts,
            max_failures_in_a_row=max_failures_in_a_row,
            eval_every_n_steps=eval_every_n_steps,
            eval_at_start=eval_at_start,
            checkpoint_retention_interval=checkpoint_retention_interval,
            status_ewa_alpha=status_ewa_alpha,
        )
        if loss_fn not in ("cispo", "ppo"):
            raise ValueError(f"loss_fn must be 'cispo' or 'ppo', not {loss_fn!r}")
        for name, value in (("loss_fn_config", loss_fn_config), ("adam_params", adam_params)):
            if value is not None:
                raise ValueError(f"{name} must be None: no backend takes it. docs/training.md lists what train takes.")
        if BackendCapability.CONCURRENT_INFERENCE not in backend.capabilities_for(model):
            raise ValueError(HOW_TO_GO_DEDICATED)
        _check_retention(checkpoint_retention_strategy, eval_fn is not None and eval_every_n_steps > 0)
        self._model, self._backend, self._config = model, backend, config
        self._rollout_fn, self._scenarios, self._eval_fn = rollout_fn, scenarios, eval_fn
        self._options = {
            "learning_rate": learning_rate,
            "loss_fn": loss_fn,
            "normalize_advantages": normalize_advantages,
            **({} if packed_sequence_length is None else {"packed_sequence_length": packed_sequence_length}),
        }
        self._save_checkpoint, self._retention = save_checkpoint, checkpoint_retention_strategy
        self._resume, self._total_scenarios = resume, total_scenarios
        self._run: Run | None = None

    def request_stop(self) -> None:
        """Begin no scenario any more, end the rollouts under way, train the groups that are ready, and return.

        The scenarios of the rollouts that ended so are handed out again by the next run.
        """
        if self._run is not None:
            self._run.stop()

    async def train(self, *, handle_signals: bool = True) -> None:
        """Run until the scenarios are done, `max_steps` is reached, or a stop was asked for.

        With `handle_signals`, the first SIGINT or SIGTERM finishes the step under way, saves and returns; the second
        one stops now, with KeyboardInterrupt. Raises an ExceptionGroup of what ended the run, PipelineRunning when
        another pipeline trains this model, ValueError when the backend has no places for the steps that may be held.
        """
        if self._run is not None:
            raise RuntimeError("this PipelineTrainer is training already")
        _check_places(self._model, self._settings, evaluates=self._eval_fn is not None)
        step = await self._backend.get_step(self._model)
        kept_state = KeptState(ModelKey(self._model.project, self._model.name).folder(Path(self._model.base_path)))
        try:
            kept = await kept_state.open(step, resume=self._resume)
            run = self._run = self._begin(step, kept, kept_state)
            await self._supervised(run, handle_signals)
        finally:
            self._run = None
            await kept_state.close()

    def _begin(self, step: int, kept: Kept, kept_state: KeptState) -> Run:
        flow = Flow(self._settings, step, skipped=set(kept.skipped))
        flow.ready = [ReadyGroup(each.scenario, each.version, each.group, each.actor_s) for each in kept.groups]
        status = StatusReporter(self._settings, flow, Counts.of(kept.counts), self._total_scenarios)
        source = ScenarioSource(self._scenarios, offset=kept.handed_out, unfinished=kept.unfinished)
        leases = StepLeases(self._model, self._backend)
        return Run(self._model, self._backend, self._config, self._settings, flow, source, kept_state, status, leases)

    async def _supervised(self, run: Run, handle_signals: bool) -> None:
        current, forced = asyncio.current_task(), False

        def finish_step() -> None:
            run.status.say("stopping after this step; once more to stop now")
            run.stop_after_step = True
            run.stop()

        def stop_now() -> None:
            nonlocal forced
            forced = True
            if current is not None:
                current.cancel()

        try:
            with (
                on_signals(finish_step, stop_now, enabled=handle_signals),
                fewer_collections(),
                step_progress(run.model, run.status),
            ):
                await self._all_parts(run)
        except asyncio.CancelledError:
            if forced:
                raise KeyboardInterrupt from None
            raise
        finally:
            await run.source.close()

    async def _all_parts(self, run: Run) -> None:
        state: dict[str, Any] = {}
        if self._resume:
            state = await asyncio.to_thread(lambda: self._model.read_state() or {})
        before = state.get("_pipeline_trainer") or {}
        if before and before.get("training_step", run.flow.version) > run.flow.version:
            warnings.warn(
                f"the last run had trained step {before['training_step']}, but the backend serves step"
                f" {run.flow.version}; the backend's step is taken.",
                RuntimeWarning,
                stacklevel=2,
            )
        async with asyncio.TaskGroup() as tasks:
            evals = Evals(run, self._eval_fn, tasks, completed=set(before.get("completed_eval_steps", ())))
            evals.last = before.get("last_eval_step", run.flow.version)
            training = Training(run, self._options, self._save_checkpoint, self._retention, evals)
            training.cumulative = dict((state.get("_metrics_builder_state") or {}).get("cum_state") or {})
            status = tasks.create_task(run.status.run())
            wanted = {run.flow.version} if self._settings.eval_at_start and not before else set[int]()
            if before and evals.last not in evals.completed:
                wanted |= {evals.last} & set(await self._backend.list_steps(self._model))
            for step in sorted(wanted if self._settings.eval_every_n_steps else ()):
                evals.begin(step)
            rollouts = tasks.create_task(Rollouts(run, self._rollout_fn).hand_out())
            why = await training.until_done()
            run.status.does("trainer", "done")
            rollouts.cancel()
            if run.stop_after_step:
                evals.cancel()
            await run.until(lambda: not evals.awaited)
            await training.save_state()
            run.status.say(f"{run.status.line()}\nPipelineTrainer ended: {why}.")
            status.cancel()


def _check_places(model: TrainableModel, settings: PipelineSettings, *, evaluates: bool) -> None:
    """Rollouts hold the current step and those that they may be older by; the next one is loaded beside them."""
    rollouts = min(settings.max_steps_off_policy + 1, settings.num_rollout_workers)
    needed = rollouts + 1 + (evaluates and settings.eval_every_n_steps > 0)
    if model.served_steps is not None and model.served_steps < needed:
        raise ValueError(
            f"this pipeline may need {needed} steps of {model.name!r} served at once ({rollouts} held by rollouts, the"
            f" next one{', one under evaluation' if needed > rollouts + 1 else ''}), and the backend has places for"
            f" {model.served_steps}. Give it more, as in LocalBackend(max_adapters={needed}), or lower"
            " max_steps_off_policy."
        )


def _check_retention(strategy: CheckpointRetentionStrategy | None, evaluates: bool) -> None:
    if isinstance(strategy, KeepRecentAndTop) and strategy.top and strategy.metric.startswith("val/") and not evaluates:
        raise ValueError(
            f"keep_recent_and_top goes by {strategy.metric!r}, which nothing logs: there is no eval_fn, or"
            " eval_every_n_steps is 0. What is logged without one: train/reward, train/<metric of a trajectory>,"
            " loss/train and the other metrics of a step."
        )
