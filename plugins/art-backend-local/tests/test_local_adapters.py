"""The identity adapter of step 0 and the check of adapters before an engine sees them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from art_backend_local.adapters.identity import write_identity_adapter
from art_backend_local.wire.lora_shape import LoraShape
from art_conformance.tiny_model import HIDDEN
from art_core.errors import AdapterMismatch, BaseModelNotFound, UnknownArgument
from art_engine_kit.adapter_files import check_adapter
from art_engine_kit.base_shapes import linear_shapes, select_modules

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(base, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_identity_adapter(folder, base, LoraShape())
    return folder


def change(adapter, **tensors):
    known = load_file(adapter / "adapter_model.safetensors")
    known.update({name.replace("__", "."): value for name, value in tensors.items()})
    save_file(known, adapter / "adapter_model.safetensors")


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


@pytest.mark.parametrize(
    ("peft_args", "error"),
    [
        ({"rank": 8}, "rank"),
        ({"r": 0}, "rank, a whole number"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"lora_alpha": -1}, "lora_alpha"),
    ],
)
def test_peft_args_that_cannot_work_are_refused_by_name(peft_args, error):
    with pytest.raises((UnknownArgument, ValueError), match=error):
        LoraShape.of(peft_args)


def test_each_kind_of_bad_adapter_is_refused_with_its_reason(adapter, base):
    shapes = linear_shapes(base)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    config = (adapter / "adapter_config.json").read_text()

    def refused(match, max_rank=16):
        with pytest.raises(AdapterMismatch, match=match):
            check_adapter(adapter, shapes, max_rank=max_rank)
        (adapter / "adapter_model.safetensors").write_bytes(whole)
        (adapter / "adapter_config.json").write_text(config)

    refused("rank 8, but the engine", max_rank=4)
    change(adapter, **{f"{Q}.lora_A.weight": np.zeros((8, HIDDEN + 1), np.float32)})
    refused(rf"q_proj.lora_A has shape \[8, {HIDDEN + 1}\] where \[r, {HIDDEN}\]")
    change(adapter, **{f"{Q}.lora_B.weight": np.zeros((7, 8), np.float32)})
    refused(rf"q_proj.lora_B has shape \[7, 8\] where \[{HIDDEN}, r\]")
    change(adapter, **{f"{Q}.lora_A.weight": np.zeros((4, HIDDEN), np.float32)})
    refused("config says rank 8")
    change(adapter, **{"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.zeros((8, 8), np.float32)})
    refused("layers.9.self_attn.q_proj'.*does not have")
    change(adapter, **{"lm_head.weight": np.zeros((8, 8), np.float32)})
    refused("no LoRA weight")
    for value in (np.nan, np.inf):
        for kind in (np.float32, np.float16, np.float64):
            bad = np.zeros((HIDDEN, 8), kind)
            bad[3, 4] = value
            change(adapter, **{f"{Q}.lora_B.weight": bad})
            refused(f"1 of {8 * HIDDEN} values that are not finite")
    change(adapter, **{f"{Q}.lora_A.weight": np.zeros((8, HIDDEN), np.int32)})
    refused("is I32")
    (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("cut short")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    refused("empty")
    (adapter / "adapter_model.safetensors").unlink()
    refused("missing")
    (adapter / "adapter_config.json").write_text("{")
    refused("cannot be read")
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    refused("'IA3'")
    save_file({f"{Q}.lora_A.weight": np.zeros((8, HIDDEN), np.float32)}, adapter / "adapter_model.safetensors")
    refused("only lora_A")
    save_file({}, adapter / "adapter_model.safetensors")
    refused("no tensors")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterMismatch, match=r"adapter_model\.bin"):
        check_adapter(adapter, shapes)


def test_bfloat16_values_are_checked(adapter, base):
    shapes = linear_shapes(base)
    finite, infinite = 0x3F80, 0x7F80

    def write(bits):
        # safetensors writes no bfloat16 from numpy, so the file is made by hand.
        value = np.full((8, HIDDEN), finite, np.uint16)
        value[0, 0] = bits
        header = {
            f"{Q}.lora_{side}.weight": {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [value.nbytes * i, value.nbytes * (i + 1)],
            }
            for i, (side, shape) in enumerate({"A": [8, HIDDEN], "B": [HIDDEN, 8]}.items())
        }
        head = json.dumps(header).encode()
        content = len(head).to_bytes(8, "little") + head + value.tobytes() * 2
        (adapter / "adapter_model.safetensors").write_bytes(content)

    write(finite)
    check_adapter(adapter, shapes)
    for bits in (infinite, infinite + 1, 0xFF80):
        write(bits)
        with pytest.raises(AdapterMismatch, match="not finite"):
            check_adapter(adapter, shapes)
