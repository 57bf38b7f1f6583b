"""What the project's own tests share: a small base model, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama model and its tokenizer."""
    from art_conformance.tiny_model import write_base_model

    return write_base_model(tmp_path_factory.mktemp("base") / "tiny")
