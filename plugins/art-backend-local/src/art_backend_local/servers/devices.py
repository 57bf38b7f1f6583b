"""Which GPUs and CPU cores a server process gets: those that were asked for, checked against the machine, or its share.

Knows indices only. Who uses a device when is `device_turns`' business.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from art_runtime.devices import Accelerator


def devices_of(chosen: tuple[int, ...] | None, there: Sequence[Accelerator]) -> tuple[int, ...]:
    """The chosen GPUs, or the machine's first one, or none on a CPU. Raises ValueError for one that isn't there."""
    if chosen is None:
        return tuple(gpu.index for gpu in there[:1])
    indices = [gpu.index for gpu in there]
    missing = [index for index in chosen if index not in indices]
    if missing:
        raise ValueError(f"GPU {missing} is not on this machine; it has: {indices or 'none'}.")
    return chosen


def devices_of_replicas(
    chosen: tuple[int, ...] | None, replicas: int, there: Sequence[Accelerator]
) -> list[tuple[int, ...]]:
    """An equal share of the GPUs for each replica, in order; without a choice one each, and on a CPU none.

    Raises ValueError when they can't be shared out equally.
    """
    if replicas == 1:
        return [devices_of(chosen, there)]
    if chosen is None and not there:
        return [()] * replicas
    gpus = devices_of(chosen, there) if chosen is not None else tuple(gpu.index for gpu in there[:replicas])
    if len(gpus) % replicas or not gpus:
        raise ValueError(
            f"inference_replicas={replicas} cannot share the GPUs {list(gpus)} equally. Give"
            f" _internal_config={{'inference_gpu_ids': [...]}} with a multiple of {replicas} GPUs, or ask for fewer"
            " replicas."
        )
    share = len(gpus) // replicas
    return [gpus[i * share : (i + 1) * share] for i in range(replicas)]


def cores_of_replicas(replicas: int) -> list[tuple[int, ...]]:
    """An equal share of the CPU cores for each of several replicas, none in particular for one alone.

    Servers bind themselves to the first cores that they may use, so several would otherwise work on the same ones.
    """
    if replicas == 1 or not hasattr(os, "sched_getaffinity"):
        return [()] * replicas
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // replicas
    return [tuple(cores[i * share : (i + 1) * share]) for i in range(replicas)]
