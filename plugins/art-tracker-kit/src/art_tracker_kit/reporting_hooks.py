"""The hooks of a tracker whose library is told by a reporter: each hands what it is told to the reporter's thread.

Knows hooks and what a run can be told; knows no library, nor when a model reports to one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from art_core import CheckpointRef, PolicyModel, TrajectoryGroup, hookimpl

from .reported import LoggedModel
from .reporter import Reporter, Run
from .tables import Table, table_of


class TrackedRun(Run, Protocol):
    """A run that takes all that ART logs."""

    def metrics(self, metrics: dict[str, float], step: int) -> None:
        """One row at a step."""

    def trajectories(self, table: Table, step: int, split: str) -> None:
        """The table of a step."""

    def adapter(self, checkpoint: CheckpointRef, base_model: str) -> None:
        """The adapter that is served now."""


TrackedRunT = TypeVar("TrackedRunT", bound=TrackedRun)


class ReportingHooks(NamedTuple):
    """To be named in the plugin's module as the hooks are called."""

    log_metrics: Callable[..., Any]
    log_trajectories: Callable[..., Any]
    checkpoint_published: Callable[..., Any]


def reporting_hooks(
    reporter: Reporter[TrackedRunT],
    reports: Callable[[LoggedModel], bool],
    *,
    uploads: Reporter[TrackedRunT] | None = None,
) -> ReportingHooks:
    """Hooks that tell `reporter` of the models that report; `uploads`, where given, of tables and checkpoints."""
    files = reporter if uploads is None else uploads

    @hookimpl
    def art_log_metrics(model: LoggedModel, metrics: dict[str, float], step: int) -> None:
        """Report one row at a step."""
        if reports(model):
            row = dict(metrics)
            reporter.tell(model, f"the metrics of step {step}", lambda run: run.metrics(row, step))

    @hookimpl
    async def art_log_trajectories(
        model: LoggedModel, trajectory_groups: Sequence[TrajectoryGroup], step: int, split: str
    ) -> None:
        """Report a table of the step's trajectories, bounded in size."""
        if reports(model):
            table = await asyncio.to_thread(table_of, trajectory_groups)
            files.tell(model, f"the trajectories of step {step}", lambda run: run.trajectories(table, step, split))

    @hookimpl
    def art_checkpoint_published(model: PolicyModel, checkpoint: CheckpointRef) -> None:
        """Report the adapter that is served now as an artifact, unless the backend keeps it elsewhere."""
        if reports(model) and checkpoint.path.is_dir():
            base_model, what = model.base_model, f"the checkpoint of step {checkpoint.step}"
            files.tell(model, what, lambda run: run.adapter(checkpoint, base_model))

    return ReportingHooks(art_log_metrics, art_log_trajectories, art_checkpoint_published)
