"""The tracker's hooks: each hands what it is told to the reporter's thread. Imports nothing of MLflow.

A model reports when its `report_metrics` names mlflow or says nothing; none does with ART_MLFLOW_MODE=disabled.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from art_core import CheckpointRef, PolicyModel, TrajectoryGroup, hookimpl
from art_tracker_kit import LoggedModel, Reporter, reports_to, table_of

from .run import MlflowRun, open_run

art_api = 1
NAME = "mlflow"
reporter: Reporter[MlflowRun] = Reporter(NAME, open_run)


def _reports(model: LoggedModel) -> bool:
    return os.environ.get("ART_MLFLOW_MODE") != "disabled" and reports_to(model, NAME)


@hookimpl
def art_log_metrics(model: LoggedModel, metrics: dict[str, float], step: int) -> None:
    """Report one row at a step."""
    if _reports(model):
        row = dict(metrics)
        reporter.tell(model, f"the metrics of step {step}", lambda run: run.metrics(row, step))


@hookimpl
async def art_log_trajectories(
    model: LoggedModel, trajectory_groups: Sequence[TrajectoryGroup], step: int, split: str
) -> None:
    """Report a table of the step's trajectories, bounded in size."""
    if _reports(model):
        table = await asyncio.to_thread(table_of, trajectory_groups)
        reporter.tell(model, f"the trajectories of step {step}", lambda run: run.trajectories(table, step, split))


@hookimpl
def art_checkpoint_published(model: PolicyModel, checkpoint: CheckpointRef) -> None:
    """Report the adapter that is served now as an artifact, unless the backend keeps it elsewhere."""
    if _reports(model) and checkpoint.path.is_dir():
        base_model, what = model.base_model, f"the checkpoint of step {checkpoint.step}"
        reporter.tell(model, what, lambda run: run.adapter(checkpoint, base_model))
