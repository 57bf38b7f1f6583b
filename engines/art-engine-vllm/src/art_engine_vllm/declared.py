"""What engine vllm declares, on every machine and on one kind."""

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
        InferenceCapability.PAUSE,
    }
)
# The CPU build computes a base request that shares a batch with adapter requests as if it had the adapter, and it
# answers /sleep with 200 without giving anything back; so neither is declared there.
BY_FLAVOUR: Final[Mapping[Flavour, frozenset[InferenceCapability]]] = {
    "cpu": EVERYWHERE | {InferenceCapability.CONCURRENT_TRAINING},
    "cuda": EVERYWHERE | {InferenceCapability.BASE_BESIDE_ADAPTERS, InferenceCapability.SLEEP},
}
