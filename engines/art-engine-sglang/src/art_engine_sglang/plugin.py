"""What art-engine-sglang registers: the inference engine named sglang. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from art_core import InferenceEngineSpec, hookimpl

from .declared import EVERYWHERE, OWN_SERVER

art_api = 1


@hookimpl
def art_register_inference_engines() -> Iterable[InferenceEngineSpec]:
    """Engine sglang."""
    return [
        InferenceEngineSpec(
            name="sglang",
            factory="art_engine_sglang.inference_engine:SglangInferenceEngine",
            summary="SGLang's server with LoRA, in an environment of its own, on CUDA GPUs or on a CPU.",
            capabilities=EVERYWHERE,
            environment="art_engine_sglang.environment:ENVIRONMENT",
            own_server=OWN_SERVER,
        )
    ]
