"""What llama.cpp's environment holds, in versions that were seen to work."""

from pathlib import Path
from typing import Final

from art_engine_kit import EnvironmentSpec, FlavourSpec

SERVE: Final = Path(__file__).with_name("in_environment") / "art_llamacpp_serve.py"
ENVIRONMENT: Final = EnvironmentSpec(
    provided_by=("xllamacpp>=2026.10",),
    shown=("xllamacpp", "gguf", "aiohttp"),
    flavours={
        "cpu": FlavourSpec(
            requirements=("xllamacpp==2026.10.11549", "gguf==0.19.0", "aiohttp>=3.14,<4", "pydantic>=2.12,<3"),
            probe=(str(SERVE), "--probe"),
            probe_env={"PYTHONPATH": str(SERVE.parent)},
            hint="xllamacpp's wheels are for Linux, macOS and Windows; there is no source to build it from.",
            disk_bytes=200_000_000,
        )
    },
)
