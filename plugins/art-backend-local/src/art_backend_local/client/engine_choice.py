"""Which engines a backend uses when none is named, and why. Knows no engine by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from art_core import InferenceEngineSpec, PluginRegistry, TrainingEngineSpec
from art_core.errors import PluginNotInstalled
from art_runtime.environments import EnvironmentMissing, locate

Spec = InferenceEngineSpec | TrainingEngineSpec


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

    Engines that can run as things are come before those whose environment is still to be made. Among them, on a GPU,
    one whose card recommends it there comes first, then one with an environment of its own, since it is made for that;
    without a GPU, one that runs in this environment. Raises PluginNotInstalled or PluginError for a name that can't be
    used, and when no inference engine is installed at all.
    """
    reasons = []
    if inference is None:
        names = registry.provided("inference engine")
        if not names:
            raise PluginNotInstalled(
                f"no inference engine is installed. To install one: {registry.to_install('inference engine')}"
            )
        inference, why = _pick(names, registry.inference_engine, has_gpu=has_gpu)
        reasons.append(f"inference engine {inference} ({why})")
    registry.inference_engine(inference)
    if training is None:
        names = registry.provided("training engine")
        if names:
            training, why = _pick(names, registry.training_engine, has_gpu=has_gpu)
        else:
            why = f"none is installed; to train: {registry.to_install('training engine')}"
        reasons.append(f"training engine {training or 'none'} ({why})")
    if training is not None:
        registry.training_engine(training)
    return EngineChoice(inference=inference, training=training, reason=", ".join(reasons))


def _pick(names: Sequence[str], card: Callable[[str], Spec], *, has_gpu: bool) -> tuple[str, str]:
    if len(names) == 1:
        return names[0], "the only one installed"
    among = f"of {', '.join(names)}"
    ready = [name for name in names if _can_run(card(name))]
    if not ready:
        return names[0], f"the first {among}, none of which has its environment yet"
    recommended = [name for name in ready if card(name).recommended_on_gpu]
    own = [name for name in ready if card(name).environment is not None]
    here = [name for name in ready if card(name).environment is None]
    if has_gpu and recommended:
        return recommended[0], f"there is a GPU, and {among} it is the one recommended there"
    if has_gpu and own:
        return own[0], f"there is a GPU, and {among} its environment is installed"
    if here:
        return here[0], f"there is {'a' if has_gpu else 'no'} GPU, and {among} it runs in this environment"
    return ready[0], f"{among} its environment is installed"


def _can_run(spec: Spec) -> bool:
    try:
        locate(spec)
    except EnvironmentMissing:
        return False
    return True
