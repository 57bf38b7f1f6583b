"""What art-engine-example registers. Imported whenever plugins are listed, so it imports nothing heavy."""

from collections.abc import Iterable

from art_core import TrainingCapability, TrainingEngineSpec, hookimpl

art_api = 1

CAPABILITIES = frozenset(
    {TrainingCapability.PREFIX_SHARING, TrainingCapability.KL_REFERENCE, TrainingCapability.EXACT_RESUME}  # yours
)


@hookimpl
def art_register_training_engines() -> Iterable[TrainingEngineSpec]:
    return [
        TrainingEngineSpec(
            name="example",
            factory="art_engine_example.engine:ExampleTrainingEngine",
            summary="LoRA training on my library.",  # yours
            capabilities=CAPABILITIES,
        )
    ]
