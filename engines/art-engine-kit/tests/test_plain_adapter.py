"""What a server is handed: the same change of every weight matrix, in a form that no server can scale otherwise."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from art_engine_kit.adapter_config import read_adapter_config
from art_engine_kit.adapter_files import Adapter, Float32, check_adapter
from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.plain_adapter import is_plain, plain_adapter

WEIGHTS = "adapter_model.safetensors"
Make = Callable[..., Path]
# By what the adapter is made with: which modules the copy has, and whether its weights are the very file.
NOT_PLAIN: dict[str, tuple[dict[str, Any], int, bool]] = {
    "rsLoRA": ({"r": 16, "use_rslora": True}, 14, True),
    "a scale by module": ({"alpha_pattern": {"q_proj": 3.0, r"layers\.1\.mlp\.up_proj": 1.0}}, 14, False),
    "a rank by module": ({"rank_pattern": {"q_proj": 2, "down_proj": 8}}, 14, False),
    "all of them": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 5}},
        14,
        False,
    ),
    "one rank, which isn't r": ({"target_modules": ["o_proj"], "rank_pattern": {"o_proj": 6}}, 2, True),
    "a pattern": ({"target_modules": r".*\.mlp\..*_proj"}, 6, True),
    "all-linear": ({"target_modules": "all-linear"}, 14, True),
    "v without q and k": ({"target_modules": ["v_proj"]}, 6, False),
    "up without gate": ({"target_modules": ["up_proj", "down_proj"]}, 6, False),
    "one layer of one": ({"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}, 4, False),
}


def change(adapter: Adapter, module: str, shapes: LinearShapes) -> Float32:
    """What the adapter adds to a module's weights."""
    if module not in adapter.pairs:
        return np.zeros(shapes[module], np.float32)
    a, b = adapter.pairs[module]
    delta: Float32 = b.float32() @ a.float32() * np.float32(adapter.config.scaling(module))
    return delta


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_the_copy_adds_the_same_to_every_module_at_one_rank_and_one_scale(
    kind: str, make_adapter: Make, shapes: LinearShapes, tmp_path: Path
) -> None:
    settings, modules, linked = NOT_PLAIN[kind]
    folder = make_adapter(**settings)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    handed = plain_adapter(folder, shapes, tmp_path / "served" / "0003")
    assert handed == tmp_path / "served" / "0003"
    given, made = check_adapter(handed, shapes), check_adapter(folder, shapes)
    for module in shapes:
        np.testing.assert_allclose(change(given, module, shapes), change(made, module, shapes), rtol=1e-5, atol=1e-5)
    config = json.loads((handed / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    assert len(given.pairs) == modules
    assert {pair.a.shape[0] for pair in given.pairs.values()} == {config["r"]} == {made.rank}
    assert is_plain(given.config, shapes)
    assert os.path.samefile(handed / WEIGHTS, folder / WEIGHTS) == linked
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["o_proj", "down_proj"]},
        {"rank_pattern": {"o_proj": 4}, "alpha_pattern": {"x": 3}},
        {"r": 1, "use_rslora": True},
    ],
)
def test_an_adapter_that_every_server_computes_alike_is_handed_over_itself(
    settings: Any, make_adapter: Make, shapes: LinearShapes, tmp_path: Path
) -> None:
    folder = make_adapter(**settings)
    assert plain_adapter(folder, shapes, tmp_path / "served") == folder
    assert not (tmp_path / "served").exists()


def test_the_canary_goes_along_and_what_was_there_before_does_not_stay(
    make_adapter: Make, shapes: LinearShapes, tmp_path: Path
) -> None:
    folder, copy = make_adapter(use_rslora=True), tmp_path / "served" / "0001"
    (folder / "canary.json").write_text('{"prompts": []}')
    copy.mkdir(parents=True)
    (copy / "adapter_model.bin").write_bytes(b"of another time")
    assert plain_adapter(folder, shapes, copy) == copy
    assert sorted(file.name for file in copy.iterdir()) == ["adapter_config.json", WEIGHTS, "canary.json"]
    shutil.rmtree(copy)
    assert read_adapter_config(folder).use_rslora, "the adapter's own folder stays as it is"


def test_a_file_system_without_links_gets_copies(
    make_adapter: Make, shapes: LinearShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    folder = make_adapter(use_rslora=True)
    handed = plain_adapter(folder, shapes, tmp_path / "served")
    assert (handed / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert not os.path.samefile(handed / WEIGHTS, folder / WEIGHTS)
