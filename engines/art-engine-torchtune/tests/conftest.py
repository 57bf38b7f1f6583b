"""Small models of the shapes that torchtune has builders for, and workers that train them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from art_conformance.serving import port_for_a_server
from art_conformance.tiny_model import write_base_model
from art_core import TrainingLaunch, installed_plugins
from art_runtime.environments import python_for

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write_random_model(folder: Path, kind: str, **settings: Any) -> Path:
    """A random model of one of transformers' kinds, such as "qwen2", with the tokenizer of the tiny model beside it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = write_base_model(folder.parent / f"{folder.name}-tokenizer")
    shape = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **settings}), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(tiny / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`random_model("qwen2", tie_word_embeddings=True)`: the folder of such a model."""

    def make(kind: str, **settings: Any) -> Path:
        return write_random_model(tmp_path_factory.mktemp(kind) / "base", kind, **settings)

    return make


@pytest.fixture(scope="session")
def launch_of() -> Callable[..., TrainingLaunch]:
    """`launch_of("torchtune", base)`: what a worker of that engine is asked to load, in fp32 on the CPU."""

    def make(engine: str, base: Path, **changes: Any) -> TrainingLaunch:
        python = python_for(installed_plugins().training_engine(engine), flavour="cpu" if engine != "torch" else None)
        facts = {"host": "127.0.0.1", "port": port_for_a_server(), "token": "secret", "dtype": "float32"}
        return TrainingLaunch(**{"base_model": base, "python": python, "max_seq_length": 2048, **facts, **changes})

    return make
