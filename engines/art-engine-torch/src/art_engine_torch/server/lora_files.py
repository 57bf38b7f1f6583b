"""Reads a PEFT adapter folder and refuses, with the reason, whatever would not be exactly this adapter on this model.

Knows files and shapes. Nothing here touches the running batch, so it can work in a thread while others generate.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .lora_batch import LoraAdapter

_KEY = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<module>\w+)"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
K = TypeVar("K")
_uids = itertools.count(1)


class AdapterRefused(ValueError):
    """The adapter was not loaded; the message says why."""


class AdapterMissing(AdapterRefused):
    """There is no adapter at that path."""


def read_adapter(
    name: str,
    folder: Path,
    *,
    layers: int,
    widths: Mapping[str, tuple[int, int]],
    max_rank: int,
    device: torch.device,
    dtype: torch.dtype,
) -> LoraAdapter:
    """The adapter in `folder`, checked against a model of `layers` layers with (in, out) `widths` per projection.

    Raises AdapterMissing or AdapterRefused.
    """
    config = _read_config(folder)
    rank, scaling = _rank_and_scaling(folder, config, max_rank)
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        other = " (adapter_model.bin is a pickle, which is not read; save it as safetensors)"
        found = other if (folder / "adapter_model.bin").exists() else ""
        raise AdapterMissing(f"{folder} has no adapter_model.safetensors{found}.")
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                layer, module, side = _parse_key(weights, key, layers, widths)
                tensor = file.get_tensor(key)
                _check_tensor(weights, key, tensor, side, rank, widths[module])
                pairs.setdefault((layer, module), {})[side] = tensors[key] = tensor
    except (SafetensorError, OSError) as error:
        raise AdapterRefused(f"{weights} is not a whole safetensors file: {error}.") from error
    if not pairs:
        raise AdapterRefused(f"{weights} holds no LoRA weights.")
    broken = _not_finite(tensors)
    if broken is not None:
        raise AdapterRefused(f"{weights}: {broken} holds NaN or infinite numbers.")
    for (layer, module), sides in pairs.items():
        if len(sides) != 2:
            raise AdapterRefused(f"{weights} has only lora_{next(iter(sides))} of layer {layer}'s {module}.")
    down = {at: sides["A"].t().to(device, dtype).contiguous() for at, sides in pairs.items()}
    # The scaling is multiplied in while still in full precision, then rounded once.
    up = {at: (sides["B"].float().t() * scaling).to(device, dtype).contiguous() for at, sides in pairs.items()}
    too_large = _not_finite(down) or _not_finite(up)
    if too_large is not None:
        raise AdapterRefused(f"{weights}: layer {too_large[0]}'s {too_large[1]} is too large for {dtype} once scaled.")
    return LoraAdapter(name=name, uid=next(_uids), rank=rank, path=str(folder), down=down, up=up)


def _not_finite(tensors: Mapping[K, Tensor]) -> K | None:
    """The first tensor with a value that isn't finite. Hundreds are looked at, so one sum each decides where it can."""
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors.values()])
    if bool(torch.isfinite(sums).all()):
        return None
    return next((key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterMissing(f"There is no adapter folder {folder}.")
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise AdapterMissing(f"{folder} has no adapter_config.json, so it is no PEFT adapter.") from None
    except ValueError as error:
        raise AdapterRefused(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise AdapterRefused(f"{path} holds no JSON object.")
    return config


def _rank_and_scaling(folder: Path, config: Mapping[str, Any], max_rank: int) -> tuple[int, float]:
    path = folder / "adapter_config.json"
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise AdapterRefused(f"{path} says peft_type={config['peft_type']!r}; only LORA adapters are served.")
    for option in (
        "use_dora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "alora_invocation_tokens",
    ):
        if config.get(option):
            raise AdapterRefused(f"{path} says {option}={config[option]!r}, which engine torch does not serve.")
    if config.get("bias", "none") != "none":
        raise AdapterRefused(f"{path} says bias={config['bias']!r}; only adapters without trained biases are served.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterRefused(f"{path} says r={rank!r}; a LoRA rank is a whole number of at least 1.")
    if rank > max_rank:
        raise AdapterRefused(f"{path} says r={rank}, above the largest rank this server takes, {max_rank}.")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterRefused(f"{path} says lora_alpha={alpha!r}, which is no number.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _parse_key(weights: Path, key: str, layers: int, widths: Mapping[str, tuple[int, int]]) -> tuple[int, str, str]:
    match = _KEY.fullmatch(key)
    if match is None or match["module"] not in widths:
        raise AdapterRefused(f"{weights} holds {key!r}; adapters may change {', '.join(widths)} of the decoder layers.")
    layer = int(match["layer"])
    if layer >= layers:
        raise AdapterRefused(
            f"{weights} holds {key!r}, but this model has {layers} layers: it was made for another base."
        )
    return layer, match["module"], match["side"]


def _check_tensor(weights: Path, key: str, tensor: Tensor, side: str, rank: int, width: tuple[int, int]) -> None:
    expected = (rank, width[0]) if side == "A" else (width[1], rank)
    if tuple(tensor.shape) != expected:
        raise AdapterRefused(
            f"{weights}: {key} has shape {tuple(tensor.shape)} instead of {expected}: the rank is not the "
            "configuration's, or the adapter was made for another base model."
        )
    if not tensor.is_floating_point():
        raise AdapterRefused(f"{weights}: {key} holds {tensor.dtype}, not floating-point numbers.")
