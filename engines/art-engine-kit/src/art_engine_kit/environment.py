"""What an engine's own virtual environment holds, and what its processes start with. Describes, installs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

Flavour = Literal["cpu", "cuda"]
# What every process of ours that computes with torch starts with.
TORCH_VARIABLES: Final[Mapping[str, str]] = {
    # Everything is read from a folder: nothing may be asked of a model hub on the way.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # GNU OpenMP's threads spin for milliseconds at every barrier unless told otherwise. Beside a trainer on the same
    # cores that takes the time away from the very thread that is waited for.
    "GOMP_SPINCOUNT": "1000",
}


@dataclass(frozen=True, kw_only=True)
class FlavourSpec:
    """What an engine's environment holds on one kind of machine, as versions that were seen to work.

    Installed in this order: `requirements`; `without_dependencies`, whose own needs are left out; `local_projects`,
    folders of small distributions shipped with the engine. Then `uninstall` is taken out again. `probe` is run by the
    environment's interpreter (arguments and added variables) and ends with 0 when the engine can be used. `hint` says
    what to try when installing fails, `disk_bytes` about how much it takes on the disk where that was seen.
    """

    requirements: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()
    local_projects: tuple[Path, ...] = ()
    uninstall: tuple[str, ...] = ()
    probe: tuple[str, ...]
    probe_env: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""
    disk_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """The virtual environment that an engine needs for itself.

    `provided_by` are requirements; an environment where one of them is met holds the engine already. `shown` are the
    distributions whose versions tell the most about it.
    """

    provided_by: tuple[str, ...]
    shown: tuple[str, ...]
    flavours: Mapping[Flavour, FlavourSpec]


def cuda_env(devices: Sequence[int]) -> dict[str, str]:
    """The variable that shows a process these GPUs and no others; none at all for a CPU."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
