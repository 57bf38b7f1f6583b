"""One training step in the host, as the verbs of `art_core.run_step`. Knows the control API and the files of a step.

The client names the step's hold, so that it lets go also of one of which it never heard that it had it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from art_core import (
    ArtError,
    CheckpointRef,
    LocalTrainResult,
    PluginRegistry,
    PolicyModel,
    PublicationReceipt,
    SavedStep,
    TrajectoryGroup,
    announce,
    publish_saved,
)
from art_engine_kit.model_folder import ModelFolder
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import SupervisedOptions

from ..wire.messages import BeginRequest, PublishRequest, PutAsideRequest, ReleaseRequest, TrainRequest
from .control_client import ControlClient
from .groups_file import groups_file
from .kl_reference import find_reference
from .waiting import TrainingBar, Waiting

JSON = dict[str, Any]


class HostStep:
    """A step of one model, from `begin` to `let_go`, whatever happens in between.

    `of_model` names the session and the model, `folder` is the model's. Without `groups` there is nothing to train:
    `begin` publishes what waits for it, and that is all. With `supervised` their replies are trained on; `keep` says
    whether the step's folder stays. `on_published` is told of each step that is served.
    """

    def __init__(
        self,
        client: ControlClient,
        registry: PluginRegistry,
        model: PolicyModel,
        of_model: dict[str, str],
        folder: ModelFolder,
        *,
        on_published: Callable[[int], None],
        groups: Sequence[TrajectoryGroup] = (),
        options: TrainOptions | None = None,
        supervised: SupervisedOptions | None = None,
        keep: bool = True,
        show: bool = False,
    ) -> None:
        self._client = client
        self._registry = registry
        self._model = model
        self._held = {**of_model, "hold": uuid4().hex}
        self._folder = folder
        self._on_published = on_published
        self._groups = groups
        self._options = options or TrainOptions()
        self._supervised = supervised
        self._show = show
        self._own_steps: list[int] = []
        self._removed: list[int] = []
        self._keep = keep
        self._step = -1
        self._discard = self._over = False

    async def begin(self) -> int:
        """Hold the model, publish what an earlier client saved and did not live to publish, and give the step that
        comes next.

        Raises ModelBusy while another step is under way, and what publishing raises.
        """
        answer = await self._client.call("begin", BeginRequest(**self._held))
        while (pending := answer["pending"]) is not None:
            await publish_saved(self._registry, self._model, self._folder.checkpoint(pending), _Pending(self))
            answer = await self._client.call("begin", BeginRequest(**self._held))
        self._own_steps = list(answer["steps"])
        self._step = int(answer["step"])
        return self._step

    async def train_and_save(self) -> SavedStep[LocalTrainResult]:
        """The host trains, and tells how far it is."""
        options = self._options
        reference = await find_reference(self._registry, self._model, options, own_steps=self._own_steps)
        self._discard = True
        async with groups_file(self._folder.jobs, self._groups) as file:
            request = TrainRequest(
                **self._held, groups_file=file, options=options, reference=reference, supervised=self._supervised
            )
            with TrainingBar(f"train {self._model.name}", enabled=self._show) as bar:

                async def heard(event: JSON) -> None:
                    bar.show(event)
                    if event["event"] == "gradient_step":
                        await self._tell_gradient_step(event)

                saved = await self._client.follow("train", request, heard)
        self._discard = False
        checkpoint = CheckpointRef(self._folder.key, int(saved["step"]), Path(saved["path"]))
        kept_as = str(checkpoint.path) if self._keep else None
        result = LocalTrainResult(step=checkpoint.step, metrics=saved["metrics"], checkpoint_path=kept_as)
        return SavedStep(checkpoint, result)

    async def _tell_gradient_step(self, event: JSON) -> None:
        # What isn't finite comes as null.
        metrics = {name: math.nan if value is None else value for name, value in event["metrics"].items()}
        told = {"model": self._model, "step": self._step, "done": event["index"] + 1, "total": event["total"]}
        await announce(self._registry, "art_gradient_step", **told, metrics=metrics)

    async def publish(self, checkpoint: CheckpointRef) -> PublicationReceipt:
        """The host checks, loads, verifies and routes."""
        request = PublishRequest(**self._held, step=checkpoint.step, keep=self._keep)
        with Waiting(f"Publishing {checkpoint.model} step {checkpoint.step}", enabled=self._show) as waiting:
            answer = await self._client.follow("publish", request, waiting.show)
        self._removed += answer["removed"]
        self._on_published(checkpoint.step)
        return _receipt(checkpoint, answer["seconds"])

    async def put_aside(self, checkpoint: CheckpointRef) -> CheckpointRef | PublicationReceipt:
        """Beside its step's place, whole."""
        answer = await self._client.call("put_aside", PutAsideRequest(**self._held, step=checkpoint.step))
        if answer["path"] is None:
            return _receipt(checkpoint, {})
        return replace(checkpoint, path=Path(answer["path"]))

    async def let_go(self) -> None:
        """Others may train the model; tells of the steps that went because they were not kept. A second call does
        nothing.
        """
        if self._over:
            return
        self._over = True
        try:
            await self._client.call("release", ReleaseRequest(**self._held, discard=self._discard))
        except ArtError:
            # Without a connection there is no session, and without a session no hold.
            return
        finally:
            await tell_deleted(self._registry, self._model, self._folder, self._removed)


class _Pending:
    """Publishes under a hold that outlives it."""

    def __init__(self, step: HostStep) -> None:
        self.publish, self.put_aside = step.publish, step.put_aside

    async def let_go(self) -> None:
        """The step that comes next goes on with the hold."""


async def tell_deleted(registry: PluginRegistry, model: PolicyModel, folder: ModelFolder, steps: list[int]) -> None:
    """Announce that these steps' folders are gone."""
    for step in steps:
        await announce(registry, "art_checkpoint_deleted", model=model, checkpoint=folder.checkpoint(step))


def _receipt(checkpoint: CheckpointRef, seconds: dict[str, float]) -> PublicationReceipt:
    return PublicationReceipt(
        model=checkpoint.model, step=checkpoint.step, inference_name=checkpoint.inference_name, seconds=seconds
    )
