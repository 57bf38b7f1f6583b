"""What a client asks of its host, as it crosses the control API. Sizes stay small: trajectories travel in files."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from art_core import ModelKey
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import KlReference, SupervisedOptions

from .deployment import Deployment

PREFIX = "/_art"


class OfModel(BaseModel):
    """A request about one model, from a client's session."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    session: str
    project: str
    name: str

    @property
    def key(self) -> ModelKey:
        """The model's key."""
        return ModelKey(self.project, self.name)


class RegisterRequest(OfModel):
    """Serve a model. `adapter_folder` is the PEFT adapter to start from, if any."""

    # An error about a field must not show the key in another.
    model_config = ConfigDict(hide_input_in_errors=True)

    entity: str | None
    adapter_folder: Path | None
    deployment: Deployment


class HeldRequest(OfModel):
    """A request that belongs to a training step; `hold` is the name that the client gave the step's hold."""

    hold: str


class BeginRequest(HeldRequest):
    """Hold the model for a training step, until it is released or the session ends."""


class OwnStep(BaseModel):
    """A step of the model's own, whose folder the host knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int


class TrainRequest(HeldRequest):
    """Train one step on the groups in `groups_file`: by their rewards, or by their replies with `supervised`.
    `reference` is the KL reference policy, None for none.
    """

    groups_file: Path
    options: TrainOptions
    reference: OwnStep | KlReference | None
    supervised: SupervisedOptions | None = None


class PublishRequest(HeldRequest):
    """Publish a saved step; with `keep` false its folder goes once a later one is served."""

    step: int
    keep: bool


class PutAsideRequest(HeldRequest):
    """Keep a saved step out of the way: a plugin vetoed it, or its step was cancelled."""

    step: int


class ReleaseRequest(HeldRequest):
    """Let the hold go. With `discard` a step that was saved under it and not yet published goes too."""

    discard: bool


class StepsRequest(OfModel):
    """Delete these steps."""

    steps: list[int]


class ForkRequest(OfModel):
    """Copy the latest checkpoint of another model, not after a step, into this one."""

    from_model: str
    from_project: str | None
    not_after_step: int | None


class LeaseRequest(OfModel):
    """Hold a step; None is the routed one."""

    step: int | None


class LeaseEnd(BaseModel):
    """Let a lease go."""

    session: str
    lease: str
