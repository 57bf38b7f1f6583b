"""What engine sglang declares, on every machine and on one kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from art_core import InferenceCapability
from art_core.engines import Flavour

EVERYWHERE: Final = frozenset(
    {
        InferenceCapability.STREAMING_TOKEN_IDS,
        InferenceCapability.TOOL_CALLS,
        InferenceCapability.UNSCALED_LOGPROBS,
        InferenceCapability.BASE_BESIDE_ADAPTERS,
        InferenceCapability.PAUSE,
    }
)
BY_FLAVOUR: Final[Mapping[Flavour, frozenset[InferenceCapability]]] = {
    "cpu": EVERYWHERE | {InferenceCapability.CONCURRENT_TRAINING},
    "cuda": EVERYWHERE,
}
