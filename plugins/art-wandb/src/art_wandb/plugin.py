"""The tracker's hooks: each hands what it is told to the reporter's thread. Imports nothing of wandb.

A model reports when its `report_metrics` names wandb, or says nothing and there is a key, or WANDB_MODE=offline.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from art_core import CheckpointRef, PolicyModel, TrajectoryGroup, hookimpl
from art_tracker_kit import LoggedModel, Reporter, reports_to, table_of

from .run import WandbRun, open_run

art_api = 1
NAME = "wandb"
reporter: Reporter[WandbRun] = Reporter(NAME, open_run)
#: wandb asks its service before it takes a table or another artifact. When that hangs, metrics still reach the run.
uploads: Reporter[WandbRun] = Reporter("wandb uploads", open_run)


def _reports(model: LoggedModel) -> bool:
    mode = os.environ.get("WANDB_MODE", "")
    if mode == "disabled":
        return False
    # A key that lies in ~/.netrc is used when wandb is asked for; that somebody once logged in asks for nothing.
    unasked = mode in ("offline", "dryrun") or bool(os.environ.get("WANDB_API_KEY"))
    return reports_to(model, NAME, unasked=unasked)


@hookimpl
def art_log_metrics(model: LoggedModel, metrics: dict[str, float], step: int) -> None:
    """Report one row, whose x-axis is `training_step`."""
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
        uploads.tell(model, f"the trajectories of step {step}", lambda run: run.trajectories(table, step, split))


@hookimpl
def art_checkpoint_published(model: PolicyModel, checkpoint: CheckpointRef) -> None:
    """Report the adapter that is served now as an artifact, unless the backend keeps it elsewhere."""
    if _reports(model) and checkpoint.path.is_dir():
        base_model = model.base_model
        uploads.tell(
            model, f"the checkpoint of step {checkpoint.step}", lambda run: run.adapter(checkpoint, base_model)
        )
