"""The settings of a pipeline and their ranges, judged when a trainer is made. Knows no model and no backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Update = Literal["pinned", "in_flight"]
Late = Literal["wait", "discard", "cancel"]


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """See `PipelineTrainer`. Raises ValueError for a value out of range."""

    num_rollout_workers: int
    min_batch_size: int
    max_batch_size: int
    max_steps_off_policy: int
    queue_maxsize: int
    limit_mean_steps_off_policy: float | None
    late_rollouts: Late
    update: Update
    max_steps: int | None
    discard_queue_multiplier: int
    log_interval_seconds: float
    stall_limit_seconds: float
    rollout_timeout_seconds: float | None
    max_attempts: int
    max_failures_in_a_row: int
    eval_every_n_steps: int
    eval_at_start: bool
    checkpoint_retention_interval: int
    status_ewa_alpha: float

    def __post_init__(self) -> None:
        for name in (
            *("num_rollout_workers", "min_batch_size", "queue_maxsize", "discard_queue_multiplier", "max_attempts"),
            *("max_failures_in_a_row", "checkpoint_retention_interval"),
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_steps_off_policy", self.max_steps_off_policy, 0)
        _at_least("eval_every_n_steps", self.eval_every_n_steps, 0)
        if self.max_steps is not None:
            _at_least("max_steps", self.max_steps, 0)
        if self.max_batch_size < self.min_batch_size:
            raise ValueError(
                f"max_batch_size ({self.max_batch_size}) must not be below min_batch_size ({self.min_batch_size})"
            )
        for name in ("log_interval_seconds", "stall_limit_seconds", "rollout_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, not {value!r}")
        if self.limit_mean_steps_off_policy is not None and not self.limit_mean_steps_off_policy >= 0:
            raise ValueError(
                f"limit_mean_steps_off_policy must be None or at least 0, not {self.limit_mean_steps_off_policy!r}"
            )
        if not 0 < self.status_ewa_alpha <= 1:
            raise ValueError(f"status_ewa_alpha must be above 0 and at most 1, not {self.status_ewa_alpha!r}")
        _one_of("late_rollouts", self.late_rollouts, ("wait", "discard", "cancel"))
        _one_of("update", self.update, ("pinned", "in_flight"))


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")
