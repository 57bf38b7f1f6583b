"""The card."""

from art_core import InferenceCapability, InferenceEngineSpec, TrainingCapability, TrainingEngineSpec, hookimpl

art_api = 1


@hookimpl
def art_register_inference_engines():
    return [
        InferenceEngineSpec(
            name="fake",
            factory="art_fake_engine.engines:FakeInference",
            summary="Serves adapters without a model.",
            capabilities=frozenset({InferenceCapability.CONCURRENT_TRAINING, InferenceCapability.PAUSE}),
        ),
        InferenceEngineSpec(
            name="fake-shared",
            factory="art_fake_engine.engines:FakeShared",
            summary="The same, but it can't serve while a step trains.",
            capabilities=frozenset({InferenceCapability.PAUSE}),
        ),
    ]


@hookimpl
def art_register_training_engines():
    return [
        TrainingEngineSpec(
            name="fake",
            factory="art_fake_engine.engines:FakeTraining",
            summary="Trains adapters without a model.",
            capabilities=frozenset({TrainingCapability.EXACT_RESUME}),
        )
    ]
