"""Adapter folders: whatever is not exactly an adapter of this model is refused, with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from art_engine_torch.server.lora_files import AdapterMissing, AdapterRefused, read_adapter

WIDTHS = {
    "q_proj": (64, 64),
    "k_proj": (64, 32),
    "v_proj": (64, 32),
    "o_proj": (64, 64),
    "gate_proj": (64, 96),
    "up_proj": (64, 96),
    "down_proj": (96, 64),
}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def read(folder: Path, *, layers: int = 2, max_rank: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    return read_adapter(
        "a", folder, layers=layers, widths=WIDTHS, max_rank=max_rank, device=torch.device("cpu"), dtype=dtype
    )


@pytest.fixture
def adapter(tiny_adapters: list[Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_adapters[0], tmp_path / "adapter")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)


def key_of(tensors: dict[str, torch.Tensor], side: str) -> str:
    return next(key for key in tensors if f"layers.1.self_attn.q_proj.lora_{side}" in key)


def test_a_whole_adapter_is_read_with_its_scaling(adapter: Path) -> None:
    read_one = read(adapter)
    tensors = load_file(adapter / WEIGHTS)
    up = tensors[key_of(tensors, "B")]
    assert read_one.rank == 4
    assert torch.allclose(read_one.up[1, "q_proj"], up.t() * 2.0)
    assert read(adapter).uid != read_one.uid


def test_missing_things_are_missing(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterMissing, match=r"no adapter folder .*nowhere"):
        read(tmp_path / "nowhere")
    (adapter / WEIGHTS).unlink()
    with pytest.raises(AdapterMissing, match=r"adapter_model\.safetensors: the weights are missing"):
        read(adapter)
    (adapter / CONFIG).unlink()
    with pytest.raises(AdapterMissing, match=CONFIG):
        read(adapter)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_and_empty_weights(adapter: Path, keep: int) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:keep])
    with pytest.raises(AdapterRefused, match="not a whole safetensors file"):
        read(adapter)


def test_weights_without_tensors(adapter: Path) -> None:
    save_file({}, adapter / WEIGHTS)
    with pytest.raises(AdapterRefused, match="holds no LoRA weights"):
        read(adapter)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 64}, "rank 64, but the engine holds adapters up to rank 16"),
        ({"r": 3}, r"down_proj.lora_A has shape \[4, 96\] where \[3, 96\] is needed"),
        ({"r": 0}, "r: must be greater than or equal to 1"),
        ({"r": "four"}, "r: must be a valid integer"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "8 being its rank"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern: must be a valid integer"),
    ],
)
def test_configurations_that_are_not_served(
    adapter: Path, json_editor: Callable[..., None], changes: dict[str, Any], says: str
) -> None:
    json_editor(adapter / CONFIG, **changes)
    with pytest.raises(AdapterRefused, match=says):
        read(adapter)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]"])
def test_configurations_that_are_no_json_object(adapter: Path, content: bytes) -> None:
    (adapter / CONFIG).write_bytes(content)
    with pytest.raises(AdapterRefused, match="JSON"):
        read(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_values_that_are_not_finite(adapter: Path, side: str, value: float) -> None:
    change_weights(adapter, lambda tensors: tensors[key_of(tensors, side)].view(-1)[-1:].fill_(value))
    with pytest.raises(AdapterRefused, match=r"1 of \d+ values that are not finite \(NaN or infinite\)"):
        read(adapter)


def test_values_too_large_for_the_served_format(adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors[key_of(tensors, "B")].fill_(60000.0))
    with pytest.raises(AdapterRefused, match="too large"):
        read(adapter, dtype=torch.float16)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_wrong_width(adapter: Path, side: str) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        key = key_of(tensors, side)
        tensors[key] = torch.zeros(4, 72) if side == "A" else torch.zeros(72, 4)

    change_weights(adapter, widen)
    with pytest.raises(AdapterRefused, match="another base model"):
        read(adapter)


def test_half_a_pair(adapter: Path) -> None:
    change_weights(adapter, lambda tensors: tensors.__delitem__(key_of(tensors, "B")))
    with pytest.raises(AdapterRefused, match=r"only lora_A for model\.layers\.1\.self_attn\.q_proj"):
        read(adapter)


def test_unknown_modules_and_layers(adapter: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"layers\.1\..*does not have. Is it an adapter of another base model"):
        read(adapter, layers=1)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in (key_of(tensors, "A"), key_of(tensors, "B")):
            tensors[key.replace("self_attn.q_proj", "self_attn.rotary")] = tensors.pop(key)

    change_weights(adapter, rename)
    with pytest.raises(AdapterRefused, match="rotary"):
        read(adapter)
