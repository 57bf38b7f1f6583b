"""The page on engines says what their cards say, and what the backends declare with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import art
from art_backend_local.client import backend as local_backend
from art_backend_serverless import ServerlessBackend
from art_core import (
    BackendCapability,
    Capability,
    InferenceCapability,
    PluginRegistry,
    TrainingCapability,
    installed_plugins,
)
from art_runtime import Accelerator
from art_runtime.environments import engine_for

PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
GPU = Accelerator(index=0, uuid="GPU-0", name="a GPU", memory_mib=80_000)


def columns(first: str) -> dict[str, dict[str, str]]:
    """What the table whose first column has this title says, by the title of each other column: a word a capability."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    (head,) = (n for n, row in enumerate(rows) if row[0] == first)
    table = {}
    for row in rows[head + 2 :]:
        if len(row) != len(rows[head]) or not row[0].startswith("`"):
            break
        table[row[0].strip("`")] = row[1:]
    return {title: {name: cells[n] for name, cells in table.items()} for n, title in enumerate(rows[head][1:])}


def assert_says(column: dict[str, str], of: type[Capability], declared: Collection[Capability], where: Any) -> None:
    """The column has a yes for what is declared, and a no for each other capability of the kind."""
    assert column == {str(each): "yes" if each in declared else "no" for each in of}, where


@pytest.fixture
def registry() -> PluginRegistry:
    return installed_plugins()


def test_the_table_has_every_capability_of_every_inference_engine(registry: PluginRegistry) -> None:
    for title, column in columns("capability").items():
        name, _, flavour = title.lower().partition(", ")
        engine = engine_for(registry.inference_engine(name), flavour or None)  # type: ignore[arg-type]
        assert_says(column, InferenceCapability, engine.capabilities, title)


def test_the_table_has_every_capability_of_every_training_engine(registry: PluginRegistry) -> None:
    said = columns("training capability")
    assert sorted(said) == registry.provided("training engine")
    for name, flavour in product(said, ("cpu", "cuda")):
        card = registry.training_engine(name)
        engine: Any = engine_for(card, flavour)  # type: ignore[arg-type]
        assert_says(said[name], TrainingCapability, engine.capabilities, (name, flavour))
        assert_says(said[name], TrainingCapability, card.capabilities, name)


@pytest.mark.parametrize("title", ["local, CPU", "local, one GPU", "local, GPUs for each"])
def test_the_table_has_every_capability_of_the_local_backend_with_each_engine(
    title: str, registry: PluginRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = () if title == "local, CPU" else (GPU,)
    monkeypatch.setattr(local_backend, "accelerators", lambda: machine)
    apart = {"trainer_gpu_ids": [0], "inference_gpu_ids": [1]} if title == "local, GPUs for each" else {}
    model = art.TrainableModel(name="agent", project="page", base_model="a-base", _internal_config=apart or None)
    engines = product(columns("training capability"), registry.provided("inference engine"))
    for training, inference in engines:
        backend = local_backend.LocalBackend(path=tmp_path, inference_engine=inference, training_engine=training)
        declared = backend.capabilities_for(model)
        assert_says(columns("backend capability")[title], BackendCapability, declared, (training, inference))


@pytest.mark.parametrize(
    ("title", "made"),
    [
        ("serverless, W&B's cloud", ServerlessBackend),
        ("serverless, `art serve`", lambda: ServerlessBackend(base_url="http://127.0.0.1:1")),
    ],
)
def test_the_table_has_every_capability_of_the_serverless_backend(
    title: str, made: Callable[[], ServerlessBackend]
) -> None:
    assert_says(columns("backend capability")[title], BackendCapability, made().capabilities, title)


def test_the_table_has_a_column_for_every_backend(registry: PluginRegistry) -> None:
    names = {title.partition(",")[0] for title in columns("backend capability")}
    assert sorted(names) == registry.provided("backend")


@pytest.mark.parametrize("name", ["torch", "vllm", "sglang"])
def test_a_server_of_ones_own_is_started_as_the_card_says(name: str, registry: PluginRegistry) -> None:
    card = registry.inference_engine(name).own_server
    command = re.findall(r"`(.*?)`", card)[0]
    assert command in " ".join(PAGE.split())
