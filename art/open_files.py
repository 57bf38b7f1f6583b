"""How many files this process may have open: the limit raised as far as it may be, and whether there is room for more.

Every connection is an open file, and the usual limit is 1,024. Knows nothing of what is opened.
"""

from __future__ import annotations

import os
import resource

# What is kept free for everything else: the user's own files, logs, programs that tools start.
SPARE = 64
# Where the system names no upper bound, it still has one, far above what anybody needs.
_ENOUGH = (1_048_576, 65_536, 10_240)


def raise_file_limit() -> int:
    """Let this process open as many files as the system allows it, and give how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in _ENOUGH if hard == resource.RLIM_INFINITY else (hard,):
        if soft != resource.RLIM_INFINITY and soft < wanted:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            except (ValueError, OSError):
                continue
            return wanted
    return soft


def file_limit() -> int:
    """How many files this process may have open now."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def files_to_spare(limit: int) -> int:
    """How many of `limit` files are kept free for others."""
    return min(SPARE, limit // 4)


def room_for_a_file(limit: int) -> bool:
    """Whether one more file may be opened without touching what is kept free. Takes microseconds.

    The system gives the lowest number that is free, so the next one tells how many are open.
    """
    try:
        descriptor = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return False
    os.close(descriptor)
    return descriptor < limit - files_to_spare(limit)


def open_files() -> int:
    """How many files this process has open; 0 where the system doesn't tell."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0
