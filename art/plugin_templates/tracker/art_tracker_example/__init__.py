"""The tracker example: a line of text for each metric and trajectory, in `example.log` beside the model's other files.

A hook that raises is told to the user and costs the step nothing. What is slow belongs into a thread: hooks may be
coroutines, and are awaited.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from art_core import CheckpointRef, ModelKey, PolicyModel, PublicationReceipt, TrajectoryGroup, hookimpl

art_api = 1


@hookimpl
async def art_log_metrics(model: PolicyModel, metrics: dict[str, float], step: int, split: str) -> None:
    lines = [f"{split} {step} {name} {value:g}" for name, value in sorted(metrics.items())]  # yours
    await asyncio.to_thread(_write, model, lines)


@hookimpl
async def art_log_trajectories(
    model: PolicyModel, trajectory_groups: Sequence[TrajectoryGroup], step: int, split: str
) -> None:
    rewards = [trajectory.reward for group in trajectory_groups for trajectory in group]
    await asyncio.to_thread(_write, model, [f"{split} {step} trajectory {reward:g}" for reward in rewards])  # yours


@hookimpl
async def art_checkpoint_published(model: PolicyModel, checkpoint: CheckpointRef, receipt: PublicationReceipt) -> None:
    line = f"published {checkpoint.step} as {receipt.inference_name}"  # yours
    await asyncio.to_thread(_write, model, [line])


def _write(model: PolicyModel, lines: Sequence[str]) -> None:
    folder = ModelKey(model.project, model.name).folder(Path(model.base_path))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "example.log").open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
