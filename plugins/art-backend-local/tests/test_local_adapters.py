"""The identity adapter of step 0, and what the base model says of its layers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from art_backend_local.adapters.identity import write_identity_adapter
from art_core.errors import BaseModelNotFound
from art_engine_kit.adapter_files import check_adapter
from art_engine_kit.base_shapes import linear_shapes, select_modules
from art_engine_kit.lora_shape import LoraShape

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(base, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_identity_adapter(folder, base, LoraShape())
    return folder


def test_identity_adapter_changes_nothing_and_covers_all_seven_projections(adapter, base):
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert len(tensors) == 2 * 2 * 7
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (8, 16, "LORA")
    for name, value in tensors.items():
        if "lora_B" in name:
            assert not value.any()
        else:
            assert np.abs(value).max() <= 1 / np.sqrt(value.shape[1])
            assert value.std() > 0.3 / np.sqrt(value.shape[1])
    check_adapter(adapter, linear_shapes(base), max_rank=16)


def test_identity_adapter_is_the_same_each_time_and_follows_its_seed(base, tmp_path):
    def make(name, **peft_args):
        folder = tmp_path / name
        folder.mkdir()
        write_identity_adapter(folder, base, LoraShape.of(peft_args))
        return load_file(folder / "adapter_model.safetensors")[f"{Q}.lora_A.weight"]

    first = make("a")
    assert np.array_equal(first, make("b"))
    assert not np.array_equal(first, make("c", random_state=1))


def test_sharded_weights_have_the_same_shapes(base, tmp_path):
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    tensors = load_file(base / "model.safetensors")
    weight_map = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, place in weight_map.items() if place == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (sharded / "config.json").write_bytes((base / "config.json").read_bytes())
    assert linear_shapes(sharded) == linear_shapes(base)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BaseModelNotFound, match="model-00002-of-00003"):
        linear_shapes(sharded)


def test_target_modules_by_ending_by_pattern_and_all_linear(base):
    shapes = linear_shapes(base)
    assert len(select_modules(shapes, ["q_proj", "v_proj"])) == 4
    assert select_modules(shapes, r".*layers\.1.*down_proj") == ["model.layers.1.mlp.down_proj"]
    assert len(select_modules(shapes, "all-linear")) == 14
    with pytest.raises(ValueError, match="'c_attn'"):
        select_modules(shapes, ["q_proj", "c_attn"])
