"""What installing the client of a training service brings along: neither torch nor a server."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from art_conformance import PluginConformance

NEVER = {
    *("torch", "transformers", "peft", "safetensors", "accelerate", "vllm", "sglang", "huggingface-hub"),
    *("starlette", "fastapi", "uvicorn", "sqlalchemy", "alembic", "wandb"),
    *("art-engine-kit", "art-training-kit", "art-runtime", "art-gateway", "art-backend-local", "art-serve"),
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_by(name: str) -> set[str]:
    """Every distribution that a distribution needs, through all of them."""
    found: set[str] = set()
    waiting = [(name, frozenset[str]())]
    while waiting:
        distribution, extras = waiting.pop()
        for line in metadata.requires(distribution) or []:
            requirement = Requirement(line)
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (extras or {""})
            )
            if wanted and normal(requirement.name) not in found:
                found.add(normal(requirement.name))
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


class TestServerlessPlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls) -> str:
        return "serverless"


def test_it_brings_neither_torch_nor_a_server() -> None:
    brought = brought_by("art-backend-serverless")
    assert {"art-core", "httpx", "art-tracker-files"} <= brought
    assert not brought & NEVER


def test_a_backend_is_made_without_any_of_them_imported() -> None:
    code = (
        "import sys\n"
        "from art.serverless.backend import ServerlessBackend\n"
        "ServerlessBackend('k')\n"
        "heavy = ['torch', 'transformers', 'peft', 'safetensors', 'starlette', 'uvicorn', 'wandb', 'pyarrow']\n"
        "assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
