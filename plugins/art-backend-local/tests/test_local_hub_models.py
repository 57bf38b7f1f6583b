"""Base models by hub name: asked last, fetched once, and a clear error when the hub can't be reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from art_backend_local.hub_models import resolve_hub_name
from art_core import PluginRegistry, resolve_base_model
from art_core.errors import BaseModelNotFound


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "./weights", "/weights", "a/b/c", "~/weights", ""])
def test_what_cannot_be_a_hub_name_is_left_to_others(name: str) -> None:
    assert resolve_hub_name(name) is None


async def test_a_hub_that_is_out_of_reach_is_named_with_a_way_out(hub_cache: Path) -> None:
    registry = PluginRegistry()
    registry.load()
    with pytest.raises(BaseModelNotFound, match=r"(?s)Qwen/Qwen3-0\.6B.*could not be fetched.*folder of weights"):
        await resolve_base_model(registry, "Qwen/Qwen3-0.6B")


def test_a_model_in_the_hubs_cache_needs_no_hub(hub_cache: Path) -> None:
    commit = "0123456789012345678901234567890123456789"
    model = hub_cache / "models--an-org--a-model"
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    assert resolve_hub_name("an-org/a-model") == snapshot
