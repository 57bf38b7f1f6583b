"""A tiny base model and adapters on it, for the tests of what is read and judged of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from art_conformance.tiny_model import write_base_model
from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import Float32, write_adapter
from art_engine_kit.base_shapes import LinearShapes, linear_shapes

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture(scope="session")
def shapes(base: Path) -> LinearShapes:
    return linear_shapes(base)


def random_pairs(config: AdapterConfig, shapes: LinearShapes) -> dict[str, tuple[Float32, Float32]]:
    """Both matrices of every module that the config names, at its rank."""
    rng = np.random.default_rng(5)
    pairs = {}
    for module in config.modules(shapes):
        (out_features, in_features), rank = shapes[module], config.rank(module)
        a, b = rng.standard_normal((rank, in_features)), rng.standard_normal((out_features, rank))
        pairs[module] = a.astype(np.float32), b.astype(np.float32)
    return pairs


@pytest.fixture
def make_adapter(shapes: LinearShapes, tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter with random weights and give its folder: `make_adapter(r=4, use_rslora=True)`."""

    def make(folder: str = "adapter", **settings: Any) -> Path:
        (tmp_path / folder).mkdir()
        config = AdapterConfig.model_validate({"r": 4, "lora_alpha": 8, "target_modules": SEVEN} | settings)
        write_adapter(tmp_path / folder, config, random_pairs(config, shapes))
        return tmp_path / folder

    return make
