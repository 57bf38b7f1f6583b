"""Keep freed memory in the process: the large blocks of one row are the next row's, and handing them back costs page
faults.

Knows glibc's two thresholds; does nothing anywhere else.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Set both thresholds as high as they go. True where that was done, False on a libc that has none."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    # Above 32 MiB the mmap threshold is refused on some versions; the trim threshold alone then still helps.
    mmap = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST) or libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST)) and bool(mmap)
