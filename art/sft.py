"""Supervised fine-tuning from files and lists: batches, their learning rates, and steps published on the way.

Knows the model's public methods. How a file is read is `chat_file`'s, how rates fall `lr_schedule`'s; what training is,
the backend's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path

from art_core import TrainResult, Trajectory

from .chat_file import count_conversations, iterate_file
from .lr_schedule import ScheduleMethod, create_lr_schedule
from .model import TrainableModel
from .train_config import TrainSFTConfig

__all__ = [
    "SFTChunk",
    "create_lr_schedule",
    "create_sft_dataset_iterator",
    "iterate_file",
    "train_sft_from_file",
]


@dataclass(frozen=True)
class SFTChunk:
    """The batches of one call of `model.train_sft`, and where in the whole run they are.

    `step` counts the batches before it, `epoch_step` those of its epoch, `epoch` from 0.
    """

    trajectories: list[Trajectory]
    config: TrainSFTConfig
    step: int
    epoch: int
    epoch_step: int


async def train_sft_from_file(
    model: TrainableModel,
    file_path: str | Path,
    epochs: int = 1,
    batch_size: int = 2,
    peak_lr: float = 2e-4,
    schedule_type: ScheduleMethod = "linear",
    warmup_ratio: float = 0.1,
    *,
    initial_step: int = 0,
    final_step: int | None = None,
    shuffle_buffer_size: int = 10000,
    seed: int = 42,
    save_every: int | None = None,
    verbose: bool = False,
) -> list[TrainResult]:
    """Train on a .jsonl file of chats, an object a line with `messages` and perhaps `tools`; gives the published steps.

    There are ⌈rows · epochs / batch_size⌉ batches; their rates rise over the first `warmup_ratio` of them to `peak_lr`
    and fall as `schedule_type` says. `initial_step` and `final_step` train only the batches from the one up to the
    other, with the rates they have in the whole run. One checkpoint is published at the end, and one every `save_every`
    batches. The whole file is read before anything is trained: a line that is no conversation is named then.

    Raises ValueError for a number out of range, InvalidTrajectory, and what `model.train_sft` raises.
    """
    _check(batch_size=batch_size, epochs=epochs, warmup_ratio=warmup_ratio)
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every is {save_every}; it counts batches, so it is at least 1.")
    total = ceil(count_conversations(file_path) * epochs / batch_size)
    end = total if final_step is None else min(final_step, total)
    if not 0 <= initial_step < end:
        raise ValueError(f"initial_step is {initial_step}; it must lie from 0 to below the last batch, {end}.")
    rates = create_lr_schedule(total, peak_lr, schedule_type, warmup_steps=int(total * warmup_ratio))
    rows = iterate_file(file_path, epochs, shuffle_buffer_size, seed, initial_skip=initial_step * batch_size)
    results = []
    for step in range(initial_step, end, save_every or end):
        part = rates[step : min(step + (save_every or end), end)]
        trajectories = list(islice(rows, len(part) * batch_size))
        config = TrainSFTConfig(learning_rate=part, batch_size=batch_size)
        results.append(await model.train_sft(trajectories, config, verbose=verbose))
    return results


def create_sft_dataset_iterator(
    trajectories: Sequence[Trajectory],
    chunk_size: int = 10,
    epochs: int = 1,
    batch_size: int = 2,
    peak_lr: float = 2e-4,
    schedule_type: ScheduleMethod = "linear",
    warmup_ratio: float = 0.1,
    shuffle: bool = True,
    seed: int = 42,
    initial_step: int = 0,
) -> Iterator[SFTChunk]:
    """The chunks of a run over a list, `chunk_size` batches each, with the rates of a schedule over
    ⌈n / batch_size⌉ · epochs batches.

    Each epoch is shuffled by `seed` + epoch. A run that got as far as batch `initial_step` goes on with the chunk that
    it is in. Raises ValueError for a number out of range.
    """
    _check(batch_size=batch_size, epochs=epochs, warmup_ratio=warmup_ratio)
    if chunk_size < 1 or initial_step < 0:
        raise ValueError(f"chunk_size is {chunk_size} and initial_step {initial_step}; at least 1 and 0 are right.")
    if not trajectories:
        raise ValueError("there are no trajectories to train on.")
    in_epoch = ceil(len(trajectories) / batch_size)
    total = in_epoch * epochs
    rates = create_lr_schedule(total, peak_lr, schedule_type, warmup_steps=int(total * warmup_ratio))
    return _chunks(trajectories, chunk_size, epochs, batch_size, rates, seed if shuffle else None, initial_step)


def _chunks(
    trajectories: Sequence[Trajectory],
    chunk_size: int,
    epochs: int,
    batch_size: int,
    rates: Sequence[float],
    seed: int | None,
    initial_step: int,
) -> Iterator[SFTChunk]:
    in_epoch = ceil(len(trajectories) / batch_size)
    skipped = initial_step // chunk_size
    for epoch in range(epochs):
        order = list(trajectories)
        if seed is not None:
            random.Random(seed + epoch).shuffle(order)
        for epoch_step in range(0, in_epoch, chunk_size):
            if skipped:
                skipped -= 1
                continue
            step = epoch * in_epoch + epoch_step
            count = min(chunk_size, in_epoch - epoch_step)
            rows = order[epoch_step * batch_size : (epoch_step + count) * batch_size]
            config = TrainSFTConfig(learning_rate=list(rates[step : step + count]), batch_size=batch_size)
            yield SFTChunk(rows, config, step, epoch, epoch_step)


def _check(*, batch_size: int, epochs: int, warmup_ratio: float) -> None:
    if batch_size < 1 or epochs < 1:
        raise ValueError(f"batch_size is {batch_size} and epochs {epochs}; both are at least 1.")
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio is {warmup_ratio:g}; it is a share of the batches, from 0 to 1.")
