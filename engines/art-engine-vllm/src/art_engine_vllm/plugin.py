"""What art-engine-vllm registers: the inference engine named vllm. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from art_core import InferenceEngineSpec, hookimpl

from .declared import EVERYWHERE, OWN_SERVER

art_api = 1


@hookimpl
def art_register_inference_engines() -> Iterable[InferenceEngineSpec]:
    """Engine vllm."""
    return [
        InferenceEngineSpec(
            name="vllm",
            factory="art_engine_vllm.inference_engine:VllmInferenceEngine",
            summary="vLLM's server with LoRA, in an environment of its own, on CUDA GPUs or on a CPU.",
            capabilities=EVERYWHERE,
            environment="art_engine_vllm.environment:ENVIRONMENT",
            own_server=OWN_SERVER,
        )
    ]
