"""The capabilities that the torch engines declare, in one place for their cards and for the engines themselves."""

from __future__ import annotations

from typing import Final

from art_core import InferenceCapability, TrainingCapability

INFERENCE: Final = frozenset(
    {
        InferenceCapability.STREAMING_TOKEN_IDS,
        InferenceCapability.TOOL_CALLS,
        InferenceCapability.UNSCALED_LOGPROBS,
        InferenceCapability.BASE_BESIDE_ADAPTERS,
        InferenceCapability.PAUSE,
        InferenceCapability.SLEEP,
        InferenceCapability.CONCURRENT_TRAINING,
    }
)
TRAINING: Final = frozenset(
    {
        TrainingCapability.PREFIX_SHARING,
        TrainingCapability.KL_REFERENCE,
        TrainingCapability.EXACT_RESUME,
        TrainingCapability.SFT,
    }
)
OWN_SERVER: Final = (
    "Start it with `ART_TORCH_API_KEY=KEY python -m art_engine_torch.server --model FOLDER --served-model-name NAME"
    " --port PORT --max-adapters 8 --max-lora-rank 16`, where it reads the folder of checkpoints under the same path as"
    " ART does."
)
