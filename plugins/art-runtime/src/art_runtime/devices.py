"""Which accelerators this machine has. Asks the driver's own tool, once, and imports no framework."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass

_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One CUDA GPU: its index as the driver counts, its name, its memory in MiB."""

    index: int
    uuid: str
    name: str
    memory_mib: int


@functools.cache
def accelerators() -> tuple[Accelerator, ...]:
    """The GPUs that this process may use, by index; none on a CPU machine. May take a second at the first call.

    CUDA_VISIBLE_DEVICES, when set, leaves out the others. A driver that doesn't answer counts as no GPU.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return _visible(_read(answer.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _read(table: str) -> tuple[Accelerator, ...]:
    found = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4 or not fields[0].isdigit():
            continue
        memory = int(fields[3]) if fields[3].isdigit() else 0
        found.append(Accelerator(index=int(fields[0]), uuid=fields[1], name=fields[2], memory_mib=memory))
    return tuple(found)


def _visible(found: tuple[Accelerator, ...], setting: str | None) -> tuple[Accelerator, ...]:
    if setting is None:
        return found
    wanted = []
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        match = [
            gpu for gpu in found if entry == str(gpu.index) or (not entry.isdigit() and gpu.uuid.startswith(entry))
        ]
        if not match:
            # CUDA itself hides everything after the first entry that it doesn't know.
            break
        wanted.append(match[0])
    return tuple(wanted)
