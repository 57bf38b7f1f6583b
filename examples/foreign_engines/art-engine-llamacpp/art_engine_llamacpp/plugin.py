"""What art-engine-llamacpp registers. Imported whenever plugins are listed, so it imports nothing heavy."""

from collections.abc import Iterable

from art_core import InferenceCapability, InferenceEngineSpec, hookimpl

art_api = 1

CAPABILITIES = frozenset(
    {
        InferenceCapability.UNSCALED_LOGPROBS,
        InferenceCapability.BASE_BESIDE_ADAPTERS,
        InferenceCapability.CONCURRENT_TRAINING,
    }
)


@hookimpl
def art_register_inference_engines() -> Iterable[InferenceEngineSpec]:
    return [
        InferenceEngineSpec(
            name="llamacpp",
            factory="art_engine_llamacpp.engine:LlamaCppEngine",
            summary="llama.cpp on a CPU, in an environment of its own; each step in a server of its own.",
            capabilities=CAPABILITIES,
            environment="art_engine_llamacpp.environment:ENVIRONMENT",
        )
    ]
