"""Makes an adapter folder into the matrices of this decoder; what is no adapter of it is refused with the reason.

Reading and judging are the kit's. Nothing here touches the running batch, so it can work in a thread while others
generate.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from art_core.errors import AdapterMismatch
from art_engine_kit.adapter_files import check_adapter

from .lora_batch import LoraAdapter

_MODULE = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>\w+)")
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
    shapes = {
        f"model.layers.{layer}.{_part(module)}.{module}": (wide_out, wide_in)
        for layer in range(layers)
        for module, (wide_in, wide_out) in widths.items()
    }
    try:
        adapter = check_adapter(folder, shapes, max_rank=max_rank)
    except AdapterMismatch as error:
        refused = AdapterMissing if isinstance(error.__cause__, FileNotFoundError) else AdapterRefused
        raise refused(str(error)) from error
    down: dict[tuple[int, str], Tensor] = {}
    up: dict[tuple[int, str], Tensor] = {}
    for module, pair in adapter.pairs.items():
        at = _place(module)
        # The scaling is multiplied in while still in full precision, then rounded once.
        scaled = torch.from_numpy(pair.b.float32()).t() * adapter.config.scaling(module)
        down[at] = torch.from_numpy(pair.a.float32()).t().to(device, dtype).contiguous()
        up[at] = scaled.to(device, dtype).contiguous()
    too_large = _not_finite(down) or _not_finite(up)
    if too_large is not None:
        raise AdapterRefused(f"{folder}: layer {too_large[0]}'s {too_large[1]} is too large for {dtype} once scaled.")
    return LoraAdapter(name=name, uid=next(_uids), rank=adapter.rank, path=str(folder), down=down, up=up)


def _not_finite(matrices: Mapping[tuple[int, str], Tensor]) -> tuple[int, str] | None:
    """The first matrix with a value that isn't finite. Hundreds are looked at, so one sum each decides where it can."""
    sums = torch.stack([matrix.sum(dtype=torch.float32) for matrix in matrices.values()])
    if bool(torch.isfinite(sums).all()):
        return None
    return next((at for at, matrix in matrices.items() if not bool(torch.isfinite(matrix).all())), None)


def _part(module: str) -> str:
    return "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def _place(module: str) -> tuple[int, str]:
    match = _MODULE.fullmatch(module)
    assert match is not None, "only modules of `shapes` are taken"
    return int(match["layer"]), match["name"]
