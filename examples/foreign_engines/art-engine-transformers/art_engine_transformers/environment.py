"""What `transformers serve` needs, in versions that were seen to start."""

from typing import Final

from art_engine_kit import EnvironmentSpec, FlavourSpec

_NEEDS: Final = ("fastapi", "openai>=1.98", "pydantic>=2", "rich", "starlette", "uvicorn", "accelerate>=1.1")

ENVIRONMENT: Final = EnvironmentSpec(
    # Not "transformers": without the rest it can be imported and can't serve.
    provided_by=("transformers-serve",),
    shown=("transformers", "torch"),
    flavours={
        "cpu": FlavourSpec(
            requirements=("transformers==5.23.0", "torch==2.13.0", *_NEEDS),
            probe=("-m", "transformers.cli.transformers", "serve", "--help"),
            hint="torch must be its CPU build (2.13.0+cpu): if your package index gives the CUDA one, add PyTorch's CPU"
            " index in pip's configuration (extra-index-url).",
            disk_bytes=1_300_000_000,
        )
    },
)
