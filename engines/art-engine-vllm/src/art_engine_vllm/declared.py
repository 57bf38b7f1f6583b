"""What engine vllm declares, on every machine and on one kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from art_core import InferenceCapability
from art_engine_kit.environment import Flavour

EVERYWHERE: Final = frozenset(
    {
        InferenceCapability.STREAMING_TOKEN_IDS,
        InferenceCapability.TOOL_CALLS,
        InferenceCapability.UNSCALED_LOGPROBS,
        InferenceCapability.PAUSE,
    }
)
# The CPU build answers /sleep with 200 without giving anything back. What makes base requests right there beside
# adapters' is `in_environment/art_vllm_lora.py`.
BY_FLAVOUR: Final[Mapping[Flavour, frozenset[InferenceCapability]]] = {
    "cpu": EVERYWHERE | {InferenceCapability.BASE_BESIDE_ADAPTERS, InferenceCapability.CONCURRENT_TRAINING},
    "cuda": EVERYWHERE | {InferenceCapability.BASE_BESIDE_ADAPTERS, InferenceCapability.SLEEP},
}
OWN_SERVER: Final = (
    "Start it with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-loras 8 --max-lora-rank"
    " 16 --logprobs-mode raw_logprobs --override-generation-config"
    ' \'{"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}\'`'
    " (and with VLLM_SERVER_DEV_MODE=1 if ART is to pause it while it trains; vLLM guards /pause by no key), where it"
    " reads the folder of checkpoints under the same path as ART does."
)
