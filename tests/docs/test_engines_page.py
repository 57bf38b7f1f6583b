"""The page on engines says what their cards say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from art_core import InferenceCapability, PluginRegistry, installed_plugins
from art_runtime.environments import engine_for

PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()


@pytest.fixture
def registry() -> PluginRegistry:
    return installed_plugins()


def test_the_table_has_every_capability_of_every_engine(registry: PluginRegistry) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    head = next(i for i, row in enumerate(rows) if row[0] == "capability")
    table = {row[0].strip("`"): row[1:] for row in rows[head + 2 :]}
    assert table.keys() == {str(capability) for capability in InferenceCapability}
    for column, title in enumerate(rows[head][1:]):
        name, _, flavour = title.lower().partition(", ")
        engine = engine_for(registry.inference_engine(name), flavour or None)  # type: ignore[arg-type]
        said = {capability for capability, cells in table.items() if cells[column] == "yes"}
        assert said == {str(capability) for capability in engine.capabilities}, title


@pytest.mark.parametrize("name", ["torch", "vllm", "sglang"])
def test_a_server_of_ones_own_is_started_as_the_card_says(name: str, registry: PluginRegistry) -> None:
    card = registry.inference_engine(name).own_server
    command = re.findall(r"`(.*?)`", card)[0]
    assert command in " ".join(PAGE.split())
