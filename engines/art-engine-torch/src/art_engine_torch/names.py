"""Names that the engine descriptions and their processes share; light enough for both sides to import."""

from __future__ import annotations

from typing import Final

API_KEY_VARIABLE: Final = "ART_TORCH_API_KEY"
POLICY_FACTORY: Final = "art_engine_torch.training.policy:load_policy"
