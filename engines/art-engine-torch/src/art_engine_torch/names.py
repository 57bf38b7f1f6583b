"""Names that the engine descriptions and their processes share; light enough for both sides to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

API_KEY_VARIABLE: Final = "ART_TORCH_API_KEY"
POLICY_FACTORY: Final = "art_engine_torch.training.policy:load_policy"
# What both processes of this engine start with.
ENVIRONMENT: Final[Mapping[str, str]] = {
    # Everything is read from a folder: nothing may be asked of a model hub on the way.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # GNU OpenMP's threads spin for milliseconds at every barrier unless told otherwise. Beside a trainer on the same
    # cores that takes the time away from the very thread that is waited for.
    "GOMP_SPINCOUNT": "1000",
}
