"""The kernel of ART: what a plugin author reads.

Protocols for backends and engines, trajectories, results, checkpoints, the publication state machine, hooks and their loader. Importing it
has no side effects: no environment is read, nothing is patched, torch isn't imported.
"""

from .announcements import announce, ask_permission, resolve_base_model, resolve_checkpoint
from .backend import Backend, BackendSpec, PolicyModel, Registration
from .capabilities import BackendCapability, Capability, InferenceCapability, TrainingCapability, require
from .checkpoint import Canary, CanaryPrompt, CheckpointManifest, CheckpointRef
from .engines import (
    EngineCall,
    InferenceEngine,
    InferenceEngineSpec,
    InferenceLaunch,
    LaunchPlan,
    TrainingEngine,
    TrainingEngineSpec,
    TrainingLaunch,
)
from .errors import (
    AdapterMismatch,
    ArtError,
    BackendUnreachable,
    BaseModelNotFound,
    CheckpointError,
    CheckpointInUse,
    CheckpointNotFound,
    CorruptCheckpoint,
    EngineRefused,
    InvalidName,
    InvalidTrajectory,
    MisspeltHook,
    ModelBusy,
    NotRegistered,
    PluginError,
    PluginNotInstalled,
    ProcessFailed,
    PublicationFailed,
    TrainingFailed,
    UnknownArgument,
    UnsupportedCapability,
)
from .hookspecs import hookimpl
from .names import ModelKey, adapter_name, check_name, inference_name, parse_inference_name
from .plugins import API_VERSION, PluginInfo, PluginRegistry, PluginStatus, installed_plugins, instantiate
from .publication import (
    Publication,
    PublicationLimits,
    PublicationReceipt,
    PublicationStage,
    Publisher,
    ServedSteps,
    publish,
)
from .results import LocalTrainResult, ServerlessTrainResult, TrainResult
from .trajectories import (
    History,
    Message,
    MessageOrChoice,
    Messages,
    MessagesAndChoices,
    PendingTrajectoryGroup,
    RolloutError,
    Tool,
    Tools,
    Trajectory,
    TrajectoryGroup,
    check_groups,
)

__all__ = [name for name in dir() if not name.startswith("_") and name[0].isupper()] + [
    "adapter_name",
    "announce",
    "ask_permission",
    "check_groups",
    "check_name",
    "hookimpl",
    "inference_name",
    "installed_plugins",
    "instantiate",
    "parse_inference_name",
    "publish",
    "require",
    "resolve_base_model",
    "resolve_checkpoint",
]
