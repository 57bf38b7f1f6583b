"""How much memory a process and everything below it hold."""

from __future__ import annotations

import psutil


def memory_of(pid: int | None) -> int:
    """Resident memory of a process and its descendants, in bytes."""
    if pid is None:
        return 0
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:
        return total
    return total
