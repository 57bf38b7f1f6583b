"""What art-engine-unsloth registers: the training engine named unsloth. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from art_core import TrainingEngineSpec, hookimpl

from .declared import CAPABILITIES

art_api = 1


@hookimpl
def art_register_training_engines() -> Iterable[TrainingEngineSpec]:
    """Engine unsloth."""
    return [
        TrainingEngineSpec(
            name="unsloth",
            factory="art_engine_unsloth.training_engine:UnslothTrainingEngine",
            summary="LoRA and QLoRA training on Unsloth, in an environment of its own: the one to take on a GPU.",
            capabilities=CAPABILITIES,
            environment="art_engine_unsloth.environment:ENVIRONMENT",
            recommended_on_gpu=True,
        )
    ]
