"""The client of ART: models to ask and train, rollouts to gather, trajectories to train on.

Importing it has no side effects. Backends come with distributions of their own and are loaded when first used.
"""

from typing import TYPE_CHECKING, Any

from art_core import (
    Backend,
    History,
    LocalTrainResult,
    Messages,
    MessagesAndChoices,
    ServerlessTrainResult,
    Tools,
    TrainResult,
    Trajectory,
    TrajectoryGroup,
)

from . import dev
from .batches import trajectory_group_batches
from .gather import RolloutsFailed, gather_trajectories, gather_trajectory_groups
from .model import Model, TrainableModel
from .retrying import retry
from .train_config import TrainConfig, TrainSFTConfig

if TYPE_CHECKING:
    LocalBackend: Any
    ServerlessBackend: Any

__all__ = [
    "Backend",
    "History",
    "LocalBackend",
    "LocalTrainResult",
    "Messages",
    "MessagesAndChoices",
    "Model",
    "RolloutsFailed",
    "ServerlessBackend",
    "ServerlessTrainResult",
    "Tools",
    "TrainConfig",
    "TrainResult",
    "TrainSFTConfig",
    "TrainableModel",
    "Trajectory",
    "TrajectoryGroup",
    "dev",
    "gather_trajectories",
    "gather_trajectory_groups",
    "retry",
    "trajectory_group_batches",
]

_BACKENDS = {"LocalBackend": "local", "ServerlessBackend": "serverless"}


def __getattr__(name: str) -> Any:
    if name in _BACKENDS:
        from .backends import backend_class_or_notice

        return backend_class_or_notice(_BACKENDS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
