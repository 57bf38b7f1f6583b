"""What a backend is: the place where a model is served and trained.

A backend knows no engine by name. It is handed engines through the registry, and everything here is public: a plugin
author reads this module, `engines` and `publication`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

from .capabilities import BackendCapability
from .engines import PluginSpec
from .results import TrainResult
from .trajectories import Trajectory, TrajectoryGroup


@runtime_checkable
class PolicyModel(Protocol):
    """What a backend may know of the model that is registered with it (`art.TrainableModel` is one).

    `base_model` is a name that a plugin resolves, a folder of weights, or a PEFT adapter folder to start from.
    `base_path` is where the model's own files lie, under `ModelKey.folder`; a Registration may move it.
    `internal_config` holds `art.dev.InternalModelConfig`: names and values were judged when the model was made
    (`art.dev.read_internal_config`), so that a backend refuses only what it can't do.
    """

    name: str
    project: str
    entity: str | None
    base_model: str
    base_path: str

    @property
    def internal_config(self) -> Mapping[str, Any]:
        """Engine and adapter settings, by their names in `InternalModelConfig`."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What a model learns by registering: where and under which key it is served, and where its files are.

    `base_path` is None when the backend keeps no files on this machine, and the model's own stays. `served_steps` is
    how many steps can be served at once, the models that share an engine taken together; None where nothing limits it.
    `inference_model_name` is what the endpoint calls the model, None where that is the model's name.
    """

    inference_base_url: str
    inference_api_key: str = field(repr=False)
    base_path: Path | None = None
    served_steps: int | None = None
    inference_model_name: str | None = None


@runtime_checkable
class Backend(Protocol):
    """Serves and trains models. Methods for a capability that is not declared raise UnsupportedCapability.

    An asynchronous context manager: leaving it closes it. Steps are whole numbers; step 0 is the untrained adapter.
    """

    @property
    def name(self) -> str:
        """The name in its BackendSpec."""

    @property
    def capabilities(self) -> frozenset[BackendCapability]:
        """What this instance declares for any model; it may depend on its configuration and never changes."""

    def capabilities_for(self, model: PolicyModel) -> frozenset[BackendCapability]:
        """What it declares for this model, whose settings may add to `capabilities` or take away: whoever has a model
        asks this.
        """

    async def register(self, model: PolicyModel) -> Registration:
        """Serve the model at its latest checkpoint, or at step 0. A second call changes nothing."""

    async def train(
        self, model: PolicyModel, trajectory_groups: Sequence[TrajectoryGroup], **options: Any
    ) -> TrainResult:
        """Train one step and publish it. Logs nothing. Raises UnknownArgument for an option that nothing reads."""

    async def train_sft(self, model: PolicyModel, trajectories: Sequence[Trajectory], **options: Any) -> TrainResult:
        """Train one step on the replies of conversations, whatever their rewards, and publish it. Takes `learning_rate`
        (one, or one for each batch) and `batch_size` (trajectories, or "auto"). Logs nothing. Capability SFT.
        """

    async def get_step(self, model: PolicyModel) -> int:
        """The latest published step."""

    async def list_steps(self, model: PolicyModel) -> list[int]:
        """Every step whose checkpoint is kept, oldest first."""

    def inference_name(self, model: PolicyModel, step: int | None = None) -> str:
        """The name to ask for: of `step`, or of the latest step that this client has seen published."""

    def lease(self, model: PolicyModel, step: int | None = None) -> AbstractAsyncContextManager[str]:
        """Hold a step (None: the latest) under its own name, which the context manager gives. Capability LEASES."""

    async def delete_checkpoints(self, model: PolicyModel, steps: Sequence[int]) -> list[int]:
        """Delete steps and say which were. Raises CheckpointInUse for a served or leased one. Capability
        DELETE_CHECKPOINTS.
        """

    async def fork_checkpoint(
        self, model: PolicyModel, from_model: str, *, from_project: str | None = None, not_after_step: int | None = None
    ) -> int:
        """Start `model` from the latest checkpoint of another (not after a step); gives the step. Capability FORK."""

    async def pull_checkpoint(
        self, model: PolicyModel, *, step: int | Literal["latest"] | None = None, local_path: Path | str | None = None
    ) -> Path:
        """Copy a checkpoint's adapter folder out and give its path. Capability PULL."""

    async def close(self) -> None:
        """Let go of everything this client holds. A second call does nothing."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class BackendSpec(PluginSpec):
    """The card of a backend; its factory takes the backend's own keyword arguments.

    `capabilities` are those it can have in some configuration; an instance declares its own.
    """

    capabilities: frozenset[BackendCapability] = frozenset()
