"""Publishing a saved checkpoint from the client: its plugins are asked, the host does it, its plugins are told.

Knows hooks and the control API; what publication consists of is the host's.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from art_core import ArtError, CheckpointRef, ModelKey, PluginRegistry, PolicyModel, announce, ask_permission
from art_engine_kit.checkpoint_folder import step_folder

from ..wire.messages import LeaseEnd, PublishRequest, RefuseRequest
from .control_client import ControlClient
from .train_hooks import TrainHooks

JSON = dict[str, Any]


class CheckpointPublisher:
    """Publishes checkpoints of one model for one client. `of_model` names the session and the model."""

    def __init__(
        self, client: ControlClient, registry: PluginRegistry, model: PolicyModel, of_model: dict[str, str]
    ) -> None:
        self._client = client
        self._registry = registry
        self._model = model
        self._of_model = of_model

    async def publish(self, checkpoint: CheckpointRef, hooks: TrainHooks, *, keep: bool, hold: str = "") -> None:
        """Ask, publish, tell. `hold` is what keeps the model from being trained by others; it ends with this.

        Raises what a plugin refused with, or PublicationFailed; the checkpoint is then kept aside if it is itself at
        fault, and the step that was served still is.
        """
        try:
            await ask_permission(
                self._registry, "art_before_publish_checkpoint", model=self._model, checkpoint=checkpoint
            )
        except Exception as error:
            refusal = RefuseRequest(**self._of_model, step=checkpoint.step)
            answer = await self._client.call("refuse", refusal, hold=hold)
            await hooks.publish_failed(CheckpointRef(checkpoint.model, checkpoint.step, Path(answer["path"])), error)
            raise
        except BaseException:
            await asyncio.shield(self.let_go(hold))
            raise
        try:
            request = PublishRequest(**self._of_model, step=checkpoint.step, keep=keep)
            receipt = await self._client.follow("publish", request, lambda _: None, hold=hold)
        except BaseException as error:
            path = Path(getattr(error, "refused_path", checkpoint.path))
            await hooks.publish_failed(CheckpointRef(checkpoint.model, checkpoint.step, path), error)
            raise
        await hooks.published(checkpoint, receipt["seconds"])
        await self.deleted(checkpoint.path.parent, receipt["removed"])

    async def deleted(self, checkpoints: Path, steps: list[int]) -> None:
        """Tell that these steps' folders are gone."""
        key = ModelKey(self._model.project, self._model.name)
        for step in steps:
            gone = CheckpointRef(key, step, step_folder(checkpoints, step))
            await announce(self._registry, "art_checkpoint_deleted", model=self._model, checkpoint=gone)

    async def let_go(self, hold: str) -> None:
        """Let others train the model."""
        try:
            await self._client.call("end_lease", LeaseEnd(session=self._of_model["session"], lease=hold))
        except ArtError:
            # Without a connection there is no session, and without a session no hold.
            return
