"""What art-engine-example registers. Imported whenever plugins are listed, so it imports nothing heavy."""

from collections.abc import Iterable

from art_core import InferenceCapability, InferenceEngineSpec, hookimpl

art_api = 1

CAPABILITIES = frozenset({InferenceCapability.STREAMING_TOKEN_IDS, InferenceCapability.PAUSE})  # yours


@hookimpl
def art_register_inference_engines() -> Iterable[InferenceEngineSpec]:
    return [
        InferenceEngineSpec(
            name="example",
            factory="art_engine_example.engine:ExampleEngine",
            summary="My server, which speaks like vLLM.",  # yours
            capabilities=CAPABILITIES,
        )
    ]
