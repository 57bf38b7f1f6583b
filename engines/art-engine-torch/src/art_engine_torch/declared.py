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
    {TrainingCapability.PREFIX_SHARING, TrainingCapability.KL_REFERENCE, TrainingCapability.EXACT_RESUME}
)
