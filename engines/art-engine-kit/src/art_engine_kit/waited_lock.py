"""A lock between processes, on a file: whoever waits for it says so, and gives up in the end.

Knows nothing of what is locked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .showing import Shown


@contextmanager
def held(file: Path, *, limit_s: float, what: str) -> Iterator[None]:
    """Hold the lock on `file`, which is made. `what` is what its other holders do, as in "another process makes X".

    Raises TimeoutError, saying what to do, when it isn't free within `limit_s` seconds.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            with Shown(f"Waiting for another process, which {what}"):
                lock.acquire(timeout=limit_s)
        except Timeout:
            raise TimeoutError(
                f"another process, which {what}, has held {file} for {limit_s:.0f} s. Wait for it, or end it"
                f" (fuser {file} names it), and try again."
            ) from None
    try:
        yield
    finally:
        lock.release()
