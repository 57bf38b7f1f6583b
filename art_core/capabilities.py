"""What a plugin can declare that it can do. Nobody asks by isinstance, hasattr or name.

Each member carries its meaning, which `art plugins show` prints and the conformance suite tests.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from .errors import UnsupportedCapability


class Capability(Enum):
    """A declared ability; `value` is its name in documents and JSON, `meaning` one sentence."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Capability:
        member = object.__new__(cls)
        member._value_ = value
        member.meaning = meaning
        return member

    def __str__(self) -> str:
        return str(self.value)


class InferenceCapability(Capability):
    """What an inference engine can do beyond serving several adapters under names of their own, which all must."""

    STREAMING_TOKEN_IDS = "streaming_token_ids", "A streamed answer carries the token ids of each chunk."
    TOOL_CALLS = "tool_calls", "Tools reach the chat template, and tool calls are parsed back into the answer."
    UNSCALED_LOGPROBS = "unscaled_logprobs", "Logprobs are the policy's own, before temperature, top_p and the like."
    BASE_BESIDE_ADAPTERS = "base_beside_adapters", "Requests for the base model may share a batch with adapters'."
    PAUSE = "pause", "Generation can be paused and resumed; requests wait meanwhile and lose nothing."
    SLEEP = "sleep", "Device memory can be given back while asleep and taken again on waking, adapters included."
    CONCURRENT_TRAINING = "concurrent_training", "Goes on serving on a device where a training engine works."


class TrainingCapability(Capability):
    """What a training engine can do beyond one step of policy-gradient training of a LoRA adapter, which all must."""

    PREFIX_SHARING = "prefix_sharing", "A prefix that several trajectories of a step share is computed once."
    KL_REFERENCE = "kl_reference", "A KL penalty towards the base model or towards another adapter."
    EXACT_RESUME = "exact_resume", "The optimizer's state is restored too: the next loss is as if nothing had stopped."
    SFT = "sft", "Supervised jobs: trains on the replies of conversations, a batch at a time."


class BackendCapability(Capability):
    """What a backend can do beyond register, train, get_step and routing to the latest published step, which all
    must.
    """

    CONCURRENT_INFERENCE = "concurrent_inference", "Inference goes on while a step trains, as PipelineTrainer needs."
    LEASES = "leases", "A step can be leased: it stays served under its own name until the lease ends."
    DELETE_CHECKPOINTS = "delete_checkpoints", "Chosen steps can be deleted; served and leased ones are refused."
    FORK = "fork", "A model can start from another model's checkpoint."
    PULL = "pull", "A checkpoint can be copied out as a PEFT adapter folder."
    SFT = "sft", "Supervised fine-tuning: a step can train on the replies of conversations; RL goes on from it."
    WARM_START = "warm_start", "base_model may be a PEFT adapter folder; training starts from its weights."
    CHECKPOINTS_ON_DISK = (
        "checkpoints_on_disk",
        "save_checkpoint=True keeps the step's adapter folder on this machine; with False the folder goes once a later"
        " step is served in its place. Either way the step is published.",
    )
    PUBLICATION_HOOKS = "publication_hooks", "Plugins hear of a step before it is served to anybody, and may refuse it."
    CHECKPOINTS_AS_ARTIFACTS = "checkpoints_as_artifacts", "Steps' adapters are kept remotely and deployed from there."


def require(capability: Capability, declared: Collection[Capability], *, plugin: str, instead: str) -> None:
    """Raise UnsupportedCapability unless `capability` is among those declared."""
    if capability not in declared:
        raise UnsupportedCapability(plugin, str(capability.value), instead)
