"""What art-engine-torchtune registers: the training engine named torchtune. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from art_core import TrainingEngineSpec, hookimpl

from .declared import CAPABILITIES

art_api = 1


@hookimpl
def art_register_training_engines() -> Iterable[TrainingEngineSpec]:
    """Engine torchtune."""
    return [
        TrainingEngineSpec(
            name="torchtune",
            factory="art_engine_torchtune.training_engine:TorchtuneTrainingEngine",
            summary="LoRA training of Llama and Qwen2.5 models on torchtune, in an environment of its own.",
            capabilities=CAPABILITIES,
            environment="art_engine_torchtune.environment:ENVIRONMENT",
        )
    ]
