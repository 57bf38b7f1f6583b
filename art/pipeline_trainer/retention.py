"""Which checkpoints stay: what a strategy is told, and the strategy that keeps the newest and the best.

Knows the history file and the names of its metrics; deletes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from art_core.history import read_history

CHECKPOINT_SAVED_METRIC = "checkpoint/saved"
CHECKPOINT_CREATED_AT_METRIC = "checkpoint/created_at_unix"
CHECKPOINT_EVAL_COMPLETED_METRIC = "checkpoint/eval_completed"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint that may be deleted. `metrics` are the means of each number that history.jsonl has for its step."""

    step: int
    path: Path | None = None
    created_at: float | None = None
    is_eval_step: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointRetentionContext:
    """What a strategy is told: the step that is served, and the checkpoints that nobody uses."""

    current_step: int
    checkpoints: Sequence[CheckpointInfo]


CheckpointRetentionStrategy: TypeAlias = Callable[[CheckpointRetentionContext], Iterable[int]]


@dataclass(frozen=True)
class KeepRecentAndTop:
    """Keeps the newest checkpoints and those with the highest metric."""

    recent: int
    top: int
    metric: str

    def __call__(self, context: CheckpointRetentionContext) -> set[int]:
        """The steps to keep."""
        newest = sorted((each.step for each in context.checkpoints), reverse=True)[: self.recent]
        measured = [
            (each.metrics[self.metric], each.step) for each in context.checkpoints if self.metric in each.metrics
        ]
        return {*newest, *(step for _, step in sorted(measured, reverse=True)[: self.top])}


def keep_recent_and_top(recent: int = 5, top: int = 2, metric: str = "val/reward") -> KeepRecentAndTop:
    """A strategy that keeps the `recent` newest checkpoints and the `top` best by a metric of history.jsonl."""
    for name, value in (("recent", recent), ("top", top)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a whole number of at least 0, not {value!r}")
    return KeepRecentAndTop(recent, top, metric)


def checkpoints_of(history: Path, steps: Collection[int], folder: Path) -> list[CheckpointInfo]:
    """What is known of each step."""
    values: dict[int, dict[str, list[float]]] = {step: {} for step in steps}
    for record in read_history(history):
        of_step = values.get(record.get("step", -1))
        for name, value in record.items() if of_step is not None else ():
            if isinstance(value, int | float) and name != "step":
                assert of_step is not None
                of_step.setdefault(name, []).append(float(value))
    found = []
    for step in sorted(values):
        metrics: dict[str, Any] = {name: sum(each) / len(each) for name, each in values[step].items()}
        path = folder / f"{step:04d}"
        found.append(
            CheckpointInfo(
                step=step,
                path=path if path.is_dir() else None,
                created_at=metrics.get(CHECKPOINT_CREATED_AT_METRIC),
                is_eval_step=CHECKPOINT_EVAL_COMPLETED_METRIC in metrics,
                metrics=metrics,
            )
        )
    return found
