"""Small models of the shapes that Unsloth trains, and others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from art_conformance.random_models import write_random_model


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`random_model("qwen2", tie_word_embeddings=True)`: the folder of such a model."""

    def make(kind: str, **settings: Any) -> Path:
        return write_random_model(tmp_path_factory.mktemp(kind) / "base", kind, **settings)

    return make
