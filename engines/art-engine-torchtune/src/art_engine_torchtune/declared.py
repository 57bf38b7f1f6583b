"""What engine torchtune declares, the same on every machine, and what users may set."""

from __future__ import annotations

from typing import Final

from art_core import TrainingCapability

CAPABILITIES: Final = frozenset(
    {
        TrainingCapability.PREFIX_SHARING,
        TrainingCapability.KL_REFERENCE,
        TrainingCapability.EXACT_RESUME,
        TrainingCapability.SFT,
    }
)
# Beside the worker's own none: torchtune is built from the base model's config, which leaves nothing to choose.
INIT_ARGS: Final = ()
