"""The tracker example: a line of JSON for each report, in `example.jsonl` beside the model's other files.

A hook that raises is told to the user and costs the step nothing. What is slow belongs into a thread: hooks may be
coroutines, and are awaited.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from art_core import CheckpointRef, ModelKey, PolicyModel, PublicationReceipt, TrajectoryGroup, hookimpl
from art_tracker_kit import reports_to

art_api = 1
NAME = "example"


@hookimpl
async def art_log_metrics(model: PolicyModel, metrics: dict[str, float], step: int, split: str) -> None:
    line = {"step": step, "split": split, "metrics": metrics}  # yours
    await asyncio.to_thread(_write, model, line)


@hookimpl
async def art_log_trajectories(
    model: PolicyModel, trajectory_groups: Sequence[TrajectoryGroup], step: int, split: str
) -> None:
    rewards = [trajectory.reward for group in trajectory_groups for trajectory in group]
    failed = [error.message for group in trajectory_groups for error in group.exceptions]
    line = {"step": step, "split": split, "rewards": rewards, "failed": failed}  # yours
    await asyncio.to_thread(_write, model, line)


@hookimpl
async def art_checkpoint_published(model: PolicyModel, checkpoint: CheckpointRef, receipt: PublicationReceipt) -> None:
    # `model.log` asks only the trackers that the model names; this hook reaches every plugin.
    if reports_to(model, NAME):
        line = {"step": checkpoint.step, "published": receipt.inference_name}  # yours
        await asyncio.to_thread(_write, model, line)


def _write(model: PolicyModel, line: dict[str, Any]) -> None:
    folder = ModelKey(model.project, model.name).folder(Path(model.base_path))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "example.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
