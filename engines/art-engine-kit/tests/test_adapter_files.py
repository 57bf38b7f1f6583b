"""The gate: each kind of adapter that doesn't fit is refused with the file, the module and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from art_core.errors import AdapterMismatch
from art_engine_kit.adapter_files import check_adapter, read_adapter, weights_file
from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.raw_tensor import RawTensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "model.layers.0.self_attn.q_proj"
Make = Callable[..., Path]


def change(folder: Path, **tensors: Any) -> None:
    """Give tensors of the file other values, None to take one out; names after `base_model.model.`."""
    known = load_file(folder / WEIGHTS)
    for name, value in tensors.items():
        known.pop(f"base_model.model.{name}", None)
        if value is not None:
            known[f"base_model.model.{name}"] = value
    save_file(known, folder / WEIGHTS)


def test_an_adapter_is_read_as_it_was_written(make_adapter: Make, shapes: LinearShapes) -> None:
    folder = make_adapter(rank_pattern={"v_proj": 9})
    adapter = check_adapter(folder, shapes, max_rank=9)
    tensors = load_file(folder / WEIGHTS)
    assert len(adapter.pairs) * 2 == len(tensors)
    for module, pair in adapter.pairs.items():
        assert np.array_equal(pair.a.float32(), tensors[f"base_model.model.{module}.lora_A.weight"])
        assert np.array_equal(pair.b.float32(), tensors[f"base_model.model.{module}.lora_B.weight"])
    assert adapter.rank == 9


def test_names_with_pefts_own_name_for_the_adapter_are_read_too(make_adapter: Make, shapes: LinearShapes) -> None:
    folder = make_adapter()
    tensors = {k.replace(".weight", ".default.weight"): v for k, v in load_file(folder / WEIGHTS).items()}
    before = read_adapter(folder)
    save_file(tensors, folder / WEIGHTS)
    assert check_adapter(folder, shapes).pairs.keys() == before.pairs.keys()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({f"{Q}.lora_A.weight": np.zeros((4, 9), np.float32)}, r"q_proj\.lora_A has shape \[4, 9\] where \[4, 64\] is"),
        ({f"{Q}.lora_B.weight": np.zeros((7, 4), np.float32)}, r"q_proj\.lora_B has shape \[7, 4\] where \[64, 4\] is"),
        ({f"{Q}.lora_A.weight": np.zeros((3, 64), np.float32)}, r"shape \[3, 64\] where \[4, 64\] is needed, 4 being"),
        ({f"{Q}.lora_A.weight": np.zeros(64, np.float32)}, r"has shape \[64\]"),
        ({f"{Q}.lora_A.weight": np.zeros((4, 64), np.int32)}, r"lora_A.weight is I32; expected one of F64, F32"),
        ({f"{Q}.lora_A.weight": None}, rf"has only lora_B for {Q}; A and B go together"),
        ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, rf"lacks weights for {Q}.*\(1 missing\)"),
        (
            {f"model.layers.77.q_proj.lora_{side}.weight": np.zeros((4, 4), np.float32) for side in "AB"},
            r"'model\.layers\.77\.q_proj', a module that its base model does not have\. Is it an adapter of another",
        ),
        ({"lm_head.weight": np.zeros((8, 8), np.float32)}, r"'base_model\.model\.lm_head\.weight' is no LoRA weight"),
        ({"model.embed_tokens.lora_embedding_A": np.zeros((4, 8), np.float32)}, r"lora_embedding_A' is no LoRA weight"),
        ({f"{Q}.lora_magnitude_vector": np.zeros(8, np.float32)}, r"is no LoRA weight"),
    ],
)
def test_weights_that_do_not_fit(changes: Any, says: str, make_adapter: Make, shapes: LinearShapes) -> None:
    folder = make_adapter()
    change(folder, **changes)
    with pytest.raises(AdapterMismatch, match=says):
        check_adapter(folder, shapes)


def test_weights_that_the_config_does_not_name_are_refused_since_peft_would_pass_them_over(
    make_adapter: Make, shapes: LinearShapes
) -> None:
    folder = make_adapter()
    config = json.loads((folder / CONFIG).read_text())
    for changes in ({"target_modules": ["q_proj"]}, {"exclude_modules": ["down_proj"]}, {"layers_to_transform": 0}):
        (folder / CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(AdapterMismatch, match="which the target_modules of its config do not name"):
            check_adapter(folder, shapes)


def test_a_rank_beyond_the_engines_is_refused_with_both_numbers(make_adapter: Make, shapes: LinearShapes) -> None:
    folder = make_adapter(rank_pattern={"layers.0.self_attn.q_proj": 32})
    with pytest.raises(AdapterMismatch, match=r"rank 32, but the engine holds adapters up to rank 16.*max_lora_rank"):
        check_adapter(folder, shapes, max_rank=16)
    assert check_adapter(folder, shapes, max_rank=32).rank == 32


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(kind: Any, value: float, make_adapter: Make, shapes: LinearShapes) -> None:
    folder = make_adapter()
    bad = np.zeros((64, 4), kind)
    bad[3, 2] = value
    change(folder, **{f"{Q}.lora_B.weight": bad})
    with pytest.raises(AdapterMismatch, match=r"q_proj\.lora_B has 1 of 256 values that are not finite"):
        check_adapter(folder, shapes)


def test_values_whose_sum_alone_overflows_are_finite(make_adapter: Make, shapes: LinearShapes) -> None:
    folder = make_adapter()
    change(folder, **{f"{Q}.lora_B.weight": np.full((64, 4), 3e38, np.float32)})
    check_adapter(folder, shapes)
    change(folder, **{f"{Q}.lora_B.weight": np.full((64, 4), 1e39, np.float64)})
    with pytest.raises(AdapterMismatch, match="256 of 256 values"):
        check_adapter(folder, shapes)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_files_cut_short(keep: int, make_adapter: Make, shapes: LinearShapes) -> None:
    folder = make_adapter()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    with pytest.raises(AdapterMismatch, match=r"adapter_model\.safetensors is not a whole safetensors file.*cut short"):
        check_adapter(folder, shapes)


def test_files_that_are_not_there_or_empty(make_adapter: Make, shapes: LinearShapes) -> None:
    folder = make_adapter()
    save_file({}, folder / WEIGHTS)
    with pytest.raises(AdapterMismatch, match="holds no LoRA weights"):
        check_adapter(folder, shapes)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterMismatch, match=r"has no adapter_model\.safetensors") as failure:
        check_adapter(folder, shapes)
    assert isinstance(failure.value.__cause__, FileNotFoundError)


def test_safetensors_come_before_the_older_file(make_adapter: Make) -> None:
    folder = make_adapter()
    (folder / "adapter_model.bin").write_bytes(b"")
    assert weights_file(folder) == folder / WEIGHTS
    (folder / WEIGHTS).unlink()
    assert weights_file(folder) == folder / "adapter_model.bin"


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("BF16", bytes.fromhex("803f00c0807f0000"), [1.0, -2.0, np.inf, 0.0]),
        ("F16", np.array([1, -2, 65504, 0], "<f2").tobytes(), [1.0, -2.0, 65504.0, 0.0]),
        ("F64", np.array([1, -2, 1e300, 0], "<f8").tobytes(), [1.0, -2.0, np.inf, 0.0]),
        ("F32", np.array([1, -2, 3, 0], "<f4").tobytes(), [1.0, -2.0, 3.0, 0.0]),
    ],
)
def test_every_kind_of_number_is_read(kind: str, data: bytes, expected: list[float]) -> None:
    read = RawTensor(kind, (2, 2), data).float32()
    assert read.dtype == np.float32
    assert read.tolist() == [expected[:2], expected[2:]]
