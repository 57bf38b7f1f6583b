"""A plugin that records every hook it hears, and can refuse or spoil a checkpoint when a check asks it to.

Registered by hand for the length of one check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from art_core import CheckpointRef, ModelKey, PluginRegistry, hookimpl

NAME = "conformance-recorder"
TRAINING = (
    *("art_before_train", "art_checkpoint_saved", "art_before_publish_checkpoint", "art_checkpoint_published"),
    *("art_checkpoint_publish_failed", "art_after_train", "art_train_failed"),
)
# Of a step that goes well, in the order in which they are called.
STEP = tuple(hook for hook in TRAINING if hook not in ("art_checkpoint_publish_failed", "art_train_failed"))


@dataclass
class Recorder:
    """What was heard of one model, in order, as (hook, arguments)."""

    key: ModelKey
    art_api: int = 1
    heard: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refuse: dict[str, Exception] = field(default_factory=dict)
    before_publish: Callable[[CheckpointRef], Any] | None = None

    def names(self, *hooks: str) -> list[str]:
        """The hooks heard so far, or those of them that are asked for."""
        return [name for name, _ in self.heard if not hooks or name in hooks]

    def checkpoints(self) -> dict[int, CheckpointRef]:
        """The saved checkpoints by step."""
        return {a["checkpoint"].step: a["checkpoint"] for name, a in self.heard if name == "art_checkpoint_saved"}

    def last(self, hook: str) -> dict[str, Any]:
        """The arguments of a hook's last call."""
        return [arguments for name, arguments in self.heard if name == hook][-1]

    def _note(self, hook: str, **arguments: Any) -> None:
        model = arguments["model"]
        if (model.project, model.name) != (self.key.project, self.key.name):
            return
        self.heard.append((hook, arguments))
        if hook in self.refuse:
            raise self.refuse[hook]

    @hookimpl
    def art_model_registered(self, backend: Any, model: Any) -> None:
        self._note("art_model_registered", backend=backend, model=model)

    @hookimpl
    def art_before_train(self, backend: Any, model: Any, step: int, trajectory_groups: Any) -> None:
        self._note("art_before_train", backend=backend, model=model, step=step, trajectory_groups=trajectory_groups)

    @hookimpl
    def art_checkpoint_saved(self, model: Any, checkpoint: CheckpointRef) -> None:
        self._note("art_checkpoint_saved", model=model, checkpoint=checkpoint)

    @hookimpl
    async def art_before_publish_checkpoint(self, model: Any, checkpoint: CheckpointRef) -> None:
        self._note("art_before_publish_checkpoint", model=model, checkpoint=checkpoint)
        if self.before_publish is not None and checkpoint.model == self.key:
            outcome = self.before_publish(checkpoint)
            if outcome is not None:
                await outcome

    @hookimpl
    def art_checkpoint_published(self, model: Any, checkpoint: CheckpointRef, receipt: Any) -> None:
        self._note("art_checkpoint_published", model=model, checkpoint=checkpoint, receipt=receipt)

    @hookimpl
    def art_checkpoint_publish_failed(self, model: Any, checkpoint: CheckpointRef, error: BaseException) -> None:
        self._note("art_checkpoint_publish_failed", model=model, checkpoint=checkpoint, error=error)

    @hookimpl
    def art_after_train(self, backend: Any, model: Any, result: Any) -> None:
        self._note("art_after_train", backend=backend, model=model, result=result)

    @hookimpl
    def art_train_failed(self, backend: Any, model: Any, step: int, error: BaseException) -> None:
        self._note("art_train_failed", backend=backend, model=model, step=step, error=error)

    @hookimpl
    def art_checkpoint_deleted(self, model: Any, checkpoint: CheckpointRef) -> None:
        self._note("art_checkpoint_deleted", model=model, checkpoint=checkpoint)

    @hookimpl
    def art_log_metrics(self, model: Any, metrics: Any, step: int, split: str) -> None:
        self._note("art_log_metrics", model=model, metrics=metrics, step=step, split=split)

    @hookimpl
    def art_log_trajectories(self, model: Any, trajectory_groups: Any, step: int, split: str) -> None:
        self._note("art_log_trajectories", model=model, trajectory_groups=trajectory_groups, step=step, split=split)


@contextmanager
def recording(registry: PluginRegistry, key: ModelKey) -> Iterator[Recorder]:
    """Listen to a model's hooks until the block is left."""
    recorder = Recorder(key)
    name = f"{NAME}-{key.project}-{key.name}"
    registry.register(recorder, name)
    try:
        yield recorder
    finally:
        registry.unregister(name)
