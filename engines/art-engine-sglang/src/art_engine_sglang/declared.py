"""What engine sglang declares, on every machine and on one kind."""

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
        InferenceCapability.BASE_BESIDE_ADAPTERS,
        InferenceCapability.PAUSE,
    }
)
BY_FLAVOUR: Final[Mapping[Flavour, frozenset[InferenceCapability]]] = {
    "cpu": EVERYWHERE | {InferenceCapability.CONCURRENT_TRAINING},
    "cuda": EVERYWHERE,
}
OWN_SERVER: Final = (
    "Start it with `SGLANG_RETURN_ORIGINAL_LOGPROB=1 python -m sglang.launch_server --model-path MODEL --enable-lora"
    " --max-loras-per-batch 8 --max-lora-rank 16 --lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj"
    " down_proj --sampling-defaults openai`, where it reads the folder of checkpoints under the same path as ART does."
)
