"""The announcements of one training step, each at most once and the opposite ones never both. Knows hooks only."""

from __future__ import annotations

from typing import Any

from art_core import CheckpointRef, LocalTrainResult, PluginRegistry, PolicyModel, PublicationReceipt, announce


class TrainHooks:
    """Announces for one step of one model. `step` is corrected once the host has said which step it made."""

    def __init__(self, registry: PluginRegistry, backend: Any, model: PolicyModel, *, step: int) -> None:
        self._registry = registry
        self._backend = backend
        self._model = model
        self.step = step

    async def saved(self, checkpoint: CheckpointRef) -> None:
        """The checkpoint is on disk, whole."""
        await announce(self._registry, "art_checkpoint_saved", model=self._model, checkpoint=checkpoint)

    async def published(self, checkpoint: CheckpointRef, seconds: dict[str, float]) -> None:
        """It is served."""
        receipt = PublicationReceipt(
            model=checkpoint.model, step=checkpoint.step, inference_name=checkpoint.inference_name, seconds=seconds
        )
        await announce(
            self._registry, "art_checkpoint_published", model=self._model, checkpoint=checkpoint, receipt=receipt
        )

    async def publish_failed(self, checkpoint: CheckpointRef, error: BaseException) -> None:
        """It was refused or could not be published."""
        await announce(
            self._registry, "art_checkpoint_publish_failed", model=self._model, checkpoint=checkpoint, error=error
        )

    async def worked(self, result: LocalTrainResult) -> None:
        """The step worked, publication included."""
        await announce(self._registry, "art_after_train", backend=self._backend, model=self._model, result=result)

    async def failed(self, error: BaseException) -> None:
        """The step failed or was refused."""
        await announce(
            self._registry, "art_train_failed", backend=self._backend, model=self._model, step=self.step, error=error
        )
