"""What Unsloth's own environment holds, for each flavour, in versions that were seen to work."""

from __future__ import annotations

from typing import Final

from art_engine_kit.environment import EnvironmentSpec, FlavourSpec
from art_training_kit.launch import KIT_REQUIREMENTS

# unsloth's own ranges are wide, and its next versions patch other things.
_REQUIREMENTS: Final = (
    "unsloth==2026.10.9",
    "unsloth-zoo==2026.10.9",
    "torch==2.13.0",
    "torchao==0.17.0",
    "transformers==5.17.0",
    "trl==1.15.0",
    "peft==0.21.2",
    "jinja2>=3.1",
    *KIT_REQUIREMENTS,
)
_PROBE: Final = (
    "-c",
    "import unsloth, peft, transformers, jinja2, openai, pluggy, starlette, uvicorn",
)

ENVIRONMENT: Final = EnvironmentSpec(
    provided_by=("unsloth>=2026.10.9,<2026.11",),
    shown=("unsloth", "unsloth_zoo", "torch", "transformers", "peft"),
    flavours={
        "cpu": FlavourSpec(
            requirements=_REQUIREMENTS,
            # It comes built for CUDA, and beside the CPU's torch importing it fails, and unsloth with it.
            uninstall=("torchvision",),
            probe=_PROBE,
            probe_env={"CUDA_VISIBLE_DEVICES": ""},
            hint="PyPI's torch for Linux brings CUDA, gigabytes that a machine without a GPU doesn't need: add"
            " PyTorch's CPU index in pip's configuration (extra-index-url) for its small build.",
            disk_bytes=2_500_000_000,
        ),
        "cuda": FlavourSpec(
            requirements=_REQUIREMENTS,
            probe=_PROBE,
            hint="torch 2.13.0 of PyPI is built for CUDA 13: the GPU's driver must be new enough for it.",
        ),
    },
)
