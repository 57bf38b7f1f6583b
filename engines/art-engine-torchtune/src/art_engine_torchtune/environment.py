"""What torchtune's own environment holds, for each flavour, in versions that were seen to work."""

from __future__ import annotations

from typing import Final

from art_engine_kit.environment import EnvironmentSpec, FlavourSpec
from art_training_kit.launch import KIT_REQUIREMENTS

# torchtune pins neither torch nor torchao: with torchao 0.18 it can't be imported.
_REQUIREMENTS: Final = (
    "torchtune==0.6.1",
    "torch==2.13.0",
    "torchao==0.17.0",
    "transformers==5.23.0",
    "jinja2>=3.1",
    *KIT_REQUIREMENTS,
)
_PROBE: Final = (
    "-c",
    "import torchtune.models.llama3_2, torchtune.models.qwen2, torchtune.modules.peft, transformers, jinja2, openai,"
    " pluggy, starlette, uvicorn",
)

ENVIRONMENT: Final = EnvironmentSpec(
    provided_by=("torchtune>=0.6.1,<0.7",),
    shown=("torchtune", "torch", "torchao", "transformers"),
    flavours={
        "cpu": FlavourSpec(
            requirements=_REQUIREMENTS,
            probe=_PROBE,
            hint="PyPI's torch for Linux brings CUDA, gigabytes that a machine without a GPU doesn't need: add"
            " PyTorch's CPU index in pip's configuration (extra-index-url) for its small build.",
            disk_bytes=1_300_000_000,
        ),
        "cuda": FlavourSpec(
            requirements=_REQUIREMENTS,
            probe=_PROBE,
            hint="torch 2.13.0 of PyPI is built for CUDA 13: the GPU's driver must be new enough for it.",
        ),
    },
)
