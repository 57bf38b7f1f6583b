"""Copies checkpoints: into another model (fork, optimizer state included) and out to a folder of the user's (pull).

Everything appears under its final name only when it is whole. Knows files only.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from uuid import uuid4

from art_core import ModelKey
from art_core.errors import CheckpointError, CheckpointNotFound
from art_engine_kit.adapter_files import weights_file
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, read_manifest, saving, whole_steps
from art_engine_kit.model_folder import ModelFolder


def fork_checkpoint(path: Path, source: ModelKey, target: ModelKey, *, not_after_step: int | None) -> int:
    """Copy the latest whole checkpoint of `source`, not after a step, to `target` under the same step.

    Raises CheckpointNotFound when there is none, CheckpointError when `target` has come that far by itself.
    """
    if source == target:
        raise CheckpointError(f"{target} cannot be forked from itself; give another from_model.")
    steps = whole_steps(ModelFolder.under(path, source).checkpoints)
    fitting = [step for step in steps if not_after_step is None or step <= not_after_step]
    if not fitting:
        limit = "" if not_after_step is None else f" of step {not_after_step} or before"
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointNotFound(f"{source} has no whole checkpoint{limit} to fork from; there: {there}.")
    step = max(fitting)
    folder = ModelFolder.under(path, target)
    own = max(whole_steps(folder.checkpoints), default=-1)
    if own >= step:
        raise CheckpointError(
            f"{target} is at step {own} already, so step {step} of {source} would not become its latest. Fork into a"
            " new model name."
        )
    manifest = read_manifest(steps[step], hashes=True)
    with saving(
        folder.checkpoint(step).path,
        step=step,
        base_model=manifest.base_model,
        engine=manifest.engine,
        metrics=manifest.metrics,
    ) as copy:
        for name in manifest.files:
            shutil.copyfile(steps[step] / name, copy / name)
    return step


def copy_adapter(checkpoint: Path, destination: Path) -> Path:
    """Copy a checkpoint's PEFT adapter to `destination`, which must be new or an empty folder; gives its path."""
    destination = destination.expanduser().resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} is not empty; give local_path a new folder.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}-{uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        for file in (checkpoint / ADAPTER_CONFIG, weights_file(checkpoint)):
            shutil.copyfile(file, temporary / file.name)
        temporary.replace(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return destination
