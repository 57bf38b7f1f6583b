"""Which process a number means: numbers are given again, so a process is known by its number and when it began.

When is told by the kernel in ticks since the machine started, which no change of the clock moves. Knows nothing of what
processes do.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import psutil

_LINUX = sys.platform == "linux"


def identity_of(pid: int) -> str:
    """What tells a running process from every other that has its number, before it or after. Raises ProcessLookupError
    when there is none.
    """
    try:
        if not _LINUX:
            return f"{psutil.Process(pid).create_time():.0f}"
        # The name, in brackets, may hold anything; the 22nd field is when it began.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return f"{_boot()}/{int(fields[19])}"
    except (OSError, psutil.Error, IndexError) as error:
        raise ProcessLookupError(f"there is no process {pid}") from error


def process_lives(pid: int, identity: str | None) -> bool:
    """Whether `pid` is the process that had this identity (None: any at all) and has not ended."""
    try:
        if identity is not None and identity_of(pid) != identity:
            return False
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ProcessLookupError):
        return False


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
