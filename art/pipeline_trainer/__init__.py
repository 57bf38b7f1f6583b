"""Rollouts and training at once: `PipelineTrainer` and what it is given. Importing it starts nothing."""

from .retention import (
    CHECKPOINT_CREATED_AT_METRIC,
    CHECKPOINT_EVAL_COMPLETED_METRIC,
    CHECKPOINT_SAVED_METRIC,
    CheckpointInfo,
    CheckpointRetentionContext,
    CheckpointRetentionStrategy,
    keep_recent_and_top,
)
from .rollout_functions import EvalFn, RolloutFn, ScenarioT, SingleRolloutFn, make_group_rollout_fn
from .scenario_source import ScenarioSourceFailed
from .status import StatusReporter
from .trainer import PipelineTrainer

__all__ = [
    "CHECKPOINT_CREATED_AT_METRIC",
    "CHECKPOINT_EVAL_COMPLETED_METRIC",
    "CHECKPOINT_SAVED_METRIC",
    "CheckpointInfo",
    "CheckpointRetentionContext",
    "CheckpointRetentionStrategy",
    "EvalFn",
    "PipelineTrainer",
    "RolloutFn",
    "ScenarioSourceFailed",
    "ScenarioT",
    "SingleRolloutFn",
    "StatusReporter",
    "keep_recent_and_top",
    "make_group_rollout_fn",
]
