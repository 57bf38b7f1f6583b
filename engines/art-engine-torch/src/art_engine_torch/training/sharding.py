"""A base spread over several ranks, each of which holds a part of every layer, by PyTorch's FSDP2.

For bases that one device doesn't hold: each layer is gathered for the time that it computes. The adapter stays whole on
every rank, and so does the output matrix. Knows a transformers model and torch.distributed; knows no adapter and no
job.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import distributed

_log = logging.getLogger(__name__)
# Of a GPU's memory. What a step needs beside the base is of the order of the base.
_SHARE_FOR_THE_BASE = 0.5


def wants_shards(wanted: bool | None, model: Any, device: torch.device) -> bool:
    """Whether to spread the base: as `wanted`, and for None where several ranks train and it takes more than half of a
    GPU. Raises ValueError where only one rank does.
    """
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    if wanted and count == 1:
        raise ValueError(
            "init_args: shard_base=True needs several ranks: give several trainer_gpu_ids, or on a CPU ranks."
        )
    if wanted is None and count > 1 and device.type == "cuda":
        return _bytes_of(model) > _SHARE_FOR_THE_BASE * torch.cuda.get_device_properties(device).total_memory
    return bool(wanted)


def shard(model: Any, device: torch.device) -> None:
    """Spread the decoder's parameters over all ranks, on `device`. What the head shares with it becomes a copy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    count, whole = distributed.get_world_size(), _bytes_of(model.model)
    mesh = init_device_mesh(device.type, (count,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh)
    mine = sum(p.to_local().nbytes for p in model.model.parameters())
    _log.info("the base is spread over %d ranks: of its decoder's %d bytes each holds %d", count, whole, mine)


def _bytes_of(module: Any) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
