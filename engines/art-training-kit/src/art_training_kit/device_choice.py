"""Which device a policy computes on, in which dtype, and whether a row's activations fit into its memory.

Knows machines, and the shapes in a transformers config; loads no model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch


def compute_device(wanted: str) -> torch.device:
    """`wanted`, or for "auto" the first CUDA device and the CPU where there is none."""
    auto = "cuda:0" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if wanted == "auto" else wanted)


def compute_dtype(device: torch.device, wanted: str) -> torch.dtype:
    """`wanted`, or for "auto" bf16 where the device multiplies in it and fp32 elsewhere."""
    if wanted != "auto":
        return cast(torch.dtype, getattr(torch, wanted))
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8") if flags.exists() else ""
    return torch.bfloat16 if "avx512_bf16" in text or "amx_bf16" in text else torch.float32


def activation_bytes(config: Any, dtype: torch.dtype) -> int:
    """What one token's forward keeps for backward, from the shapes of a layer of a transformers text config."""
    hidden, wide = config.hidden_size, config.intermediate_size
    heads = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = heads * (3 * config.num_attention_heads + 4 * config.num_key_value_heads)
    return int(config.num_hidden_layers * (6 * hidden + 3 * wide + 2 * attention) * dtype.itemsize)


def too_large_to_keep(need: int, device: torch.device) -> bool:
    """True where so many bytes of activations should be computed again in the backward pass rather than kept."""
    if device.type == "cuda":
        return bool(need > 0.8 * torch.cuda.mem_get_info(device)[0])
    return bool(need > 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
