"""The kernel of ART: the words on which two kinds of plugin must agree.

Protocols for backends and engines, trajectories, results, hooks, the order of a training step, and the plugin loader.
Errors are in `art_core.errors`, the parts of a publication in `art_core.publication`. Importing it has no side effects:
no environment is read, nothing is patched, torch isn't imported.
"""

from .announcements import announce, ask_permission, resolve_base_model, resolve_checkpoint
from .backend import Backend, BackendSpec, PolicyModel, Registration
from .capabilities import BackendCapability, Capability, InferenceCapability, TrainingCapability, require
from .engines import (
    EngineCall,
    InferenceEngine,
    InferenceEngineSpec,
    InferenceLaunch,
    LaunchPlan,
    TrainingEngine,
    TrainingEngineSpec,
    TrainingLaunch,
)  # fmt: skip
from .errors import ArtError
from .hookspecs import hookimpl
from .names import CheckpointRef, ModelKey, check_name, inference_name
from .pending_group import PendingTrajectoryGroup
from .plugin_gates import API_VERSION
from .publication import PublicationReceipt
from .registry import PluginRegistry, installed_plugins
from .results import LocalTrainResult, ServerlessTrainResult, TrainResult
from .steps import PublishVerbs, SavedStep, StepVerbs, publish_saved, run_step
from .trajectories import (
    History,
    Message,
    MessageOrChoice,
    Messages,
    MessagesAndChoices,
    RolloutError,
    Tool,
    Tools,
    Trajectory,
    TrajectoryGroup,
    check_groups,
)  # fmt: skip

__all__ = [
    "API_VERSION", "ArtError", "Backend", "BackendCapability", "BackendSpec", "Capability", "CheckpointRef",
    "EngineCall", "History", "InferenceCapability", "InferenceEngine", "InferenceEngineSpec", "InferenceLaunch",
    "LaunchPlan", "LocalTrainResult", "Message", "MessageOrChoice", "Messages", "MessagesAndChoices", "ModelKey",
    "PendingTrajectoryGroup", "PluginRegistry", "PolicyModel", "PublicationReceipt", "PublishVerbs", "Registration",
    "RolloutError", "SavedStep", "ServerlessTrainResult", "StepVerbs", "Tool", "Tools", "TrainResult",
    "TrainingCapability", "TrainingEngine", "TrainingEngineSpec", "TrainingLaunch", "Trajectory", "TrajectoryGroup",
    "announce", "ask_permission", "check_groups", "check_name", "hookimpl", "inference_name", "installed_plugins",
    "publish_saved", "require", "resolve_base_model", "resolve_checkpoint", "run_step",
]  # fmt: skip
