"""What art-engine-transformers registers. Imported whenever plugins are listed, so it imports nothing heavy."""

from collections.abc import Iterable

from art_core import InferenceCapability, InferenceEngineSpec, hookimpl

art_api = 1

CAPABILITIES = frozenset[InferenceCapability]()


@hookimpl
def art_register_inference_engines() -> Iterable[InferenceEngineSpec]:
    return [
        InferenceEngineSpec(
            name="transformers",
            factory="art_engine_transformers.engine:TransformersEngine",
            summary="transformers serve, which holds no adapters and tells no token ids: unfit for training.",
            capabilities=CAPABILITIES,
            environment="art_engine_transformers.environment:ENVIRONMENT",
        )
    ]
