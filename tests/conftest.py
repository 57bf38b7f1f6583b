"""What the project's own tests share: a small base model, and the scripts that make pages, as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def module_of() -> Iterator[Callable[[Path], Any]]:
    """The module that a script is, which stands beside the tests and in no package."""
    with pytest.MonkeyPatch.context() as patch:

        def load(script: Path) -> Any:
            spec = importlib.util.spec_from_file_location(script.stem, script)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, script.stem, module)  # where dataclasses look for their module
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture(scope="session")
def tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama model and its tokenizer."""
    from art_conformance.tiny_model import write_base_model

    return write_base_model(tmp_path_factory.mktemp("base") / "tiny")
