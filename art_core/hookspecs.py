"""Every hook of ART. Hooks register and announce; protocols do the work.

Registration hooks are collected from all plugins. `art_resolve_*` stop at the first result that isn't None.
`art_before_*` may refuse by raising. All others announce: each implementation is isolated from the others, and what it
returns is awaited when it can be. A plugin writes `from art_core import hookimpl` and decorates functions of these
names; it may leave out arguments that it doesn't need.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from .backend import Backend, BackendSpec, PolicyModel
    from .engines import InferenceEngineSpec, TrainingEngineSpec
    from .names import CheckpointRef
    from .publication import PublicationReceipt
    from .results import TrainResult
    from .trajectories import TrajectoryGroup

PROJECT = "art"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Announced = Awaitable[None] | None


@hookspec
def art_register_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """The backends of this plugin, as cards: name, summary, capabilities, and where the code is ("module:attribute"),
    which is imported when the backend is first used. Called when plugins load.
    """


@hookspec
def art_register_inference_engines() -> Iterable[InferenceEngineSpec]:  # type: ignore[empty-body]
    """The inference engines of this plugin, as cards. Called when plugins load."""


@hookspec
def art_register_training_engines() -> Iterable[TrainingEngineSpec]:  # type: ignore[empty-body]
    """The training engines of this plugin, as cards. Called when plugins load."""


@hookspec
def art_register_commands(cli: typer.Typer) -> None:
    """Add commands to the `art` command. Called when it starts.

    :param cli: the application; `@cli.command()` adds to it.
    """


@hookspec(firstresult=True)
def art_resolve_base_model(name: str) -> Path | None:
    """The folder of weights for a base model name, or None when this plugin doesn't know the name. Called at
    `model.register(backend)`, unless the name is a folder.

    :param name: what the user gave as `base_model`. May take minutes (a download).
    """


@hookspec(firstresult=True)
def art_resolve_checkpoint(model: PolicyModel, step: int) -> Path | None:
    """The adapter folder of a step that the backend doesn't have itself, or None.

    :param model: the model whose step is wanted.
    :param step: the step.
    """


@hookspec
def art_before_train(
    backend: Backend, model: PolicyModel, step: int, trajectory_groups: Sequence[TrajectoryGroup]
) -> Announced:
    """Called before a step trains. Raising refuses the step, and the error reaches the caller of `backend.train`.

    :param step: the step that would come out.
    :param trajectory_groups: as given to `train`.
    """


@hookspec
def art_before_publish_checkpoint(model: PolicyModel, checkpoint: CheckpointRef) -> Announced:
    """Called before a saved checkpoint is published. Raising refuses it; the old step stays served.

    :param checkpoint: the step and its folder.
    """


@hookspec
def art_model_registered(backend: Backend, model: PolicyModel) -> Announced:
    """A model was registered with a backend and can be asked."""


@hookspec
def art_gradient_step(model: PolicyModel, step: int, done: int, total: int, metrics: dict[str, float]) -> Announced:
    """The optimizer took one of its steps. Told as it happens, while the others go on and before the checkpoint is
    saved, by backends that hear of it: both of ours do.

    :param step: the step that would come out.
    :param done: how many there were, from 1. It begins anew where a backend tries the step again.
    :param total: how many there will be.
    :param metrics: of this one, such as `loss/train`.
    """


@hookspec
def art_after_train(backend: Backend, model: PolicyModel, result: TrainResult) -> Announced:
    """A training step worked, publication included. Exactly one of this and `art_train_failed` is called for a step."""


@hookspec
def art_train_failed(backend: Backend, model: PolicyModel, step: int, error: BaseException) -> Announced:
    """A training step failed or was refused. Exactly one of this and `art_after_train` is called for a step.

    :param step: the step that would have come out.
    """


@hookspec
def art_checkpoint_saved(model: PolicyModel, checkpoint: CheckpointRef) -> Announced:
    """A checkpoint is on disk, whole. It isn't served yet.

    :param checkpoint: has `model`, `step` and `path`, which is no folder of this machine where the backend keeps it
        elsewhere.
    """


@hookspec
def art_checkpoint_published(model: PolicyModel, checkpoint: CheckpointRef, receipt: PublicationReceipt) -> Announced:
    """A checkpoint is served: verified and routed. Exactly one of this and `art_checkpoint_publish_failed` is called.

    :param receipt: under which name, and how long each stage took.
    """


@hookspec
def art_checkpoint_publish_failed(model: PolicyModel, checkpoint: CheckpointRef, error: BaseException) -> Announced:
    """A checkpoint was refused or could not be published; the old step is still served. Exactly one of this and
    `art_checkpoint_published` is called.
    """


@hookspec
def art_checkpoint_deleted(model: PolicyModel, checkpoint: CheckpointRef) -> Announced:
    """A checkpoint's folder is gone."""


@hookspec
def art_log_metrics(model: PolicyModel, metrics: dict[str, float], step: int, split: str) -> Announced:
    """`model.log` has metrics for a step.

    :param metrics: with their sections, such as `train/reward` and `loss/train`.
    :param split: "train", "val" or "test".
    """


@hookspec
def art_log_trajectories(
    model: PolicyModel, trajectory_groups: Sequence[TrajectoryGroup], step: int, split: str
) -> Announced:
    """`model.log` has trajectories for a step; nothing of them may be dropped."""
