"""The tracker's hooks. Files are written in a thread, one at a time per model folder, whatever process logs to it.

Imports pyarrow only when trajectories are logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from art_core import ModelKey, TrajectoryGroup, hookimpl
from art_core.history import HISTORY, append_history

art_api = 1
LOCK_LIMIT_S = 240.0


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
        with _locked(folder):
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

        with _locked(folder):
            add_trajectories(trajectories_path(folder, split, step), trajectory_groups)

    await asyncio.to_thread(write)


def _folder(model: LoggedModel) -> Path:
    return ModelKey(model.project, model.name).folder(Path(model.base_path)).absolute()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep whoever else logs to the model waiting, in other processes too. The lock lies beside the folder.

    Raises TimeoutError when one keeps this one waiting too long.
    """
    from filelock import FileLock, Timeout  # only when something is logged

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.log.lock"))
    try:
        lock.acquire(timeout=LOCK_LIMIT_S, poll_interval=0.01)
    except Timeout as error:
        raise TimeoutError(
            f"another process has been writing to {folder} for {LOCK_LIMIT_S:.0f} s, so this was not logged; it holds"
            f" {lock.lock_file}. End that process, and log again."
        ) from error
    try:
        yield
    finally:
        lock.release()
