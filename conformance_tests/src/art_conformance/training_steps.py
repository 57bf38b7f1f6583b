"""One step of a training engine held against another's: what both are asked, and how far apart their files are.

Knows launches, jobs and checkpoints; knows no engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from art_core import TrainingLaunch, TrajectoryGroup, installed_plugins
from art_engine_kit.checkpoint_folder import ADAPTER_WEIGHTS
from art_engine_kit.environment import Flavour
from art_engine_kit.groups_file import write_groups
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import AdapterOptions, SupervisedOptions, TrainJob
from art_runtime.environments import python_for

from .serving import port_for_a_server

RATE: Final = 1e-3
# Weights of two fp32 steps that are the same but for rounding are nearer than this.
WEIGHTS: Final = 0.05 * RATE
# With the usual 1e-8 an element whose gradient is 0 but for rounding moves by the whole rate, either way.
_EPSILON: Final = 1e-6


def step_launch(engine: str, base: Path, *, flavour: Flavour | None = "cpu", **changes: Any) -> TrainingLaunch:
    """What a worker of that engine is asked to load, in fp32 on the CPU unless `changes` say otherwise."""
    card = installed_plugins().training_engine(engine)
    python = python_for(card, flavour=flavour if card.environment is not None else None)
    facts = {"host": "127.0.0.1", "port": port_for_a_server(), "token": "secret", "dtype": "float32"}
    return TrainingLaunch(**{"base_model": base, "python": python, "max_seq_length": 2048, **facts, **changes})


def step_job(start: Path, groups: list[TrajectoryGroup], folder: Path, step: int = 1, **options: Any) -> TrainJob:
    """A job of one optimizer step in all, unless `options` say otherwise, whose checkpoint lies below `folder`."""
    folder.mkdir(exist_ok=True)
    write_groups(folder / f"groups-{step}.json", groups)
    return TrainJob(
        model="project/agent", step=step, start=start, destination=folder / "checkpoints" / f"{step:04d}",
        groups_file=folder / f"groups-{step}.json", adapter=AdapterOptions(trainer_args={"adam_epsilon": _EPSILON}),
        options=TrainOptions(**{"learning_rate": RATE, "grad_accumulation_sequences": 1000, **options}),
    )  # fmt: skip


def replies_job(start: Path, groups: list[TrajectoryGroup], folder: Path, step: int = 1) -> TrainJob:
    """A job of the same groups by their replies, all of them one batch."""
    job = step_job(start, groups, folder, step)
    supervised = SupervisedOptions(learning_rates=[RATE], batch_size=1000)
    return job.model_copy(update={"options": TrainOptions(), "supervised": supervised})


def tensors(folder: Path, name: str = ADAPTER_WEIGHTS) -> dict[str, NDArray[Any]]:
    """Those of one of a checkpoint's files."""
    return load_file(folder / name)


def farthest(one: Path, other: Path, name: str = ADAPTER_WEIGHTS) -> tuple[float, float]:
    """The largest difference of two checkpoints' tensors, and their largest element."""
    ours, theirs = tensors(one, name), tensors(other, name)
    assert ours.keys() == theirs.keys()
    apart = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)
    return apart, max(float(np.abs(values).max()) for key, values in theirs.items() if not key.endswith(".step"))
