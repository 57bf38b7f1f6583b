"""What SGLang's own environment holds, for each flavour, in versions that were seen to work.

There is no CPU build of SGLang on the package index. Its wheel runs on a CPU when installed without its CUDA needs and
started by our launcher, which stands in for what the missing kernels' package would define.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from art_engine_kit.environment import EnvironmentSpec, FlavourSpec

FOLDER: Final = Path(__file__).with_name("in_environment")
SERVE: Final = FOLDER / "art_sglang_serve.py"
OPTIONS: Final = FOLDER / "art_sglang_options.py"
CPU_SHIMS: Final = Path(__file__).with_name("cpu_shims")
# What the plain CPU path needs of the wheel's own requirements, and nothing that is linked to CUDA.
_CPU_NEEDS: Final = (
    "torch==2.13.0",
    "torchvision==0.28.0",
    "triton",
    "aiohttp",
    "anthropic>=0.20.0",
    "blobfile==3.0.0",
    "compressed-tensors==0.18.0",
    "datasets",
    "distro",
    "einops",
    "fastapi",
    "gguf",
    "interegular",
    "IPython",
    "jsonschema",
    "llguidance<2.0.0,>=1.7.6",
    "msgspec",
    "ninja",
    "numba==0.65.1",
    "numpy",
    "nvidia-ml-py",
    "openai==2.8.0",
    "openai-harmony==0.0.4",
    "orjson",
    "packaging",
    "partial_json_parser",
    "pillow",
    "prometheus-client>=0.20.0",
    "psutil",
    "pybase64",
    "pydantic",
    "python-multipart",
    "pyzmq>=25.1.2",
    "regex",
    "requests",
    "scipy",
    "sentencepiece==0.2.1",
    "setproctitle",
    "soundfile==0.13.1",
    "tiktoken",
    "tokenizers==0.23.2",
    "tqdm",
    "transformers==5.19.0",
    "uvicorn>=0.51",
    "uvloop",
    "watchfiles",
    "xgrammar==0.2.7",
    "xxhash",
    "zstandard",
)

ENVIRONMENT: Final = EnvironmentSpec(
    provided_by=("sglang>=0.5.23",),
    shown=("sglang", "torch", "transformers"),
    flavours={
        "cpu": FlavourSpec(
            requirements=_CPU_NEEDS,
            without_dependencies=("sglang==0.5.23",),
            probe=(str(SERVE), "--probe", "--device", "cpu"),
            probe_env={"PYTHONPATH": str(CPU_SHIMS), "SGLANG_USE_CPU_ENGINE": "1"},
            hint="torch must be its CPU build (2.13.0+cpu): if your package index gives the CUDA one, add PyTorch's CPU"
            " index in pip's configuration (extra-index-url).",
            disk_bytes=2_800_000_000,
        ),
        "cuda": FlavourSpec(
            requirements=("sglang>=0.5.23,<0.6",),
            probe=(str(SERVE), "--probe"),
            probe_env={"PYTHONPATH": ""},
            hint="SGLang's wheel is built for one version of CUDA: the GPU's driver must be new enough for it.",
        ),
    },
)
