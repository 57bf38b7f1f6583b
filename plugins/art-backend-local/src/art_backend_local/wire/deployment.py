"""What serves and trains a model: engines, interpreters, servers, and the model's settings. Built in the client.

Knows what makes two models share a server or a worker, and when inference goes on while a step trains.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from art_core import InferenceCapability

from .settings import ModelSettings


class Deployment(BaseModel):
    """Everything that a host starts, or finds, for a model.

    `base_model` is what the user called it, `base_folder` holds the weights. `inference_python` and `training_python`
    are the interpreters of the engines' environments; `training_engine` None: serve only. `replicas` servers are
    started, unless `inference_urls` are servers that run already, which take `inference_api_key`. A server holds at
    most `max_adapters` steps at once.
    """

    # An error about a field must not show the key in another.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_model: str
    base_folder: Path
    inference_engine: str
    inference_python: str
    replicas: int
    inference_urls: tuple[str, ...]
    inference_api_key: str = Field(repr=False)
    training_engine: str | None
    training_python: str
    max_adapters: int
    settings: ModelSettings

    @property
    def serving_key(self) -> str:
        """Equal for models that are served together."""
        return "\n".join(["infer", *(str(value) for _, value in self._serving())])

    @property
    def training_key(self) -> str:
        """Equal for models that one worker trains in turn."""
        parts = (self.training_engine, self.training_python, self.base_folder, self.settings.training_key())
        return "\n".join(["train", *map(str, parts)])

    def differs_from(self, other: Deployment) -> list[str]:
        """In words, what keeps the two from being served together."""
        return [
            what for (what, ours), (_, theirs) in zip(self._serving(), other._serving(), strict=True) if ours != theirs
        ]

    def _serving(self) -> list[tuple[str, Any]]:
        return [
            ("base model", self.base_folder),
            ("inference engine", self.inference_engine),
            ("interpreter for inference", self.inference_python),
            ("inference settings", self.settings.inference_key()),
            ("max_adapters", self.max_adapters),
            ("number of replicas", self.replicas),
            ("inference_url", self.inference_urls),
        ]


def works_at_once(settings: ModelSettings, declared: Collection[object], *, has_gpu: bool, attached: bool) -> bool:
    """True when inference goes on while a step trains: on devices of their own, on a server of the user's (`attached`,
    whose device is not ours to give), or on a CPU with an engine that declares CONCURRENT_TRAINING. Two processes on
    one GPU take turns whatever they declare, since its memory is one.
    """
    return settings.dedicated or attached or (not has_gpu and InferenceCapability.CONCURRENT_TRAINING in declared)
