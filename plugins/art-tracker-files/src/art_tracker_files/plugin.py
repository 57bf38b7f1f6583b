"""The tracker's hooks. Files are written in a thread, one at a time per model folder.

Imports pyarrow only when trajectories are logged.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

from art_core import ModelKey, TrajectoryGroup, hookimpl
from art_core.history import HISTORY, append_history

art_api = 1


class LoggedModel(Protocol):
    """What the tracker knows of a model: where its folder is. Models that are not trained are logged too."""

    name: str
    project: str
    base_path: str


@hookimpl
async def art_log_metrics(model: LoggedModel, metrics: dict[str, float], step: int, split: str) -> None:
    """Append one line to history.jsonl."""
    folder = _folder(model)

    def write() -> None:
        with _lock(folder):
            append_history(folder / HISTORY, metrics, step=step, split=split)

    await asyncio.to_thread(write)


@hookimpl
async def art_log_trajectories(
    model: LoggedModel, trajectory_groups: Sequence[TrajectoryGroup], step: int, split: str
) -> None:
    """Add the groups to the parquet file of their step and split."""
    folder = _folder(model)

    def write() -> None:
        from .trajectory_files import add_trajectories, trajectories_path

        with _lock(folder):
            add_trajectories(trajectories_path(folder, split, step), trajectory_groups)

    await asyncio.to_thread(write)


def _folder(model: LoggedModel) -> Path:
    return ModelKey(model.project, model.name).folder(Path(model.base_path)).absolute()


@cache
def _lock(_folder: Path) -> threading.Lock:
    return threading.Lock()
