"""Which engines a backend uses when none is named, and why; and the capabilities on a card. Knows no engine by name."""

from __future__ import annotations

from dataclasses import dataclass

from art_core import InferenceCapability, PluginNotInstalled, PluginRegistry


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The engines' names and a sentence with the reason. `training` None: nothing that trains is installed."""

    inference: str
    training: str | None
    reason: str


def choose_engines(
    registry: PluginRegistry, *, inference: str | None, training: str | None, has_gpu: bool
) -> EngineChoice:
    """Fill in what was not named, from what is installed.

    On a GPU an inference engine that declares SLEEP comes first, since it can share the device with training; without
    one, an engine that goes on serving while a step trains. Raises PluginNotInstalled or PluginError for a name that
    can't be used, and when no inference engine is installed at all.
    """
    reasons = []
    if inference is None:
        inference, why = _pick_inference(registry, has_gpu=has_gpu)
        reasons.append(f"inference engine {inference} ({why})")
    registry.inference_engine(inference)
    if training is None:
        training, why = _pick_training(registry, inference)
        reasons.append(f"training engine {training or 'none'} ({why})")
    if training is not None:
        registry.training_engine(training)
    return EngineChoice(inference=inference, training=training, reason=", ".join(reasons))


def no_training_engine(registry: PluginRegistry) -> PluginNotInstalled:
    """The error for training with nothing that trains."""
    return PluginNotInstalled(
        "No training engine is installed, so this backend serves models but cannot train them. To train: pip install"
        " art-engine-unsloth (CUDA) or pip install art-engine-torch, and register the model again."
    )


def _pick_inference(registry: PluginRegistry, *, has_gpu: bool) -> tuple[str, str]:
    names = registry.provided("inference engine")
    if not names:
        raise PluginNotInstalled(
            "no inference engine is installed. To install one: pip install art-engine-vllm (CUDA) or pip install"
            " art-engine-torch"
        )
    if len(names) == 1:
        return names[0], "the only one installed"
    wanted = InferenceCapability.SLEEP if has_gpu else InferenceCapability.CONCURRENT_TRAINING
    where = "there is a GPU" if has_gpu else "there is no GPU"
    fitting = [name for name in names if wanted in registry.inference_engine(name).capabilities]
    if fitting:
        return fitting[0], f"{where}, and of {', '.join(names)} it declares {wanted}"
    return names[0], f"the first of {', '.join(names)}"


def _pick_training(registry: PluginRegistry, inference: str) -> tuple[str | None, str]:
    names = registry.provided("training engine")
    if not names:
        return None, "none is installed; to train: pip install art-engine-unsloth (CUDA) or art-engine-torch"
    if len(names) == 1:
        return names[0], "the only one installed"
    if inference in names:
        return inference, f"of {', '.join(names)} it shares its environment with the inference engine"
    return names[0], f"the first of {', '.join(names)}"
