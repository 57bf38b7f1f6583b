"""Walks, measures and removes folders that another process changes meanwhile: what is gone is passed over.

A path that was listed may be moved or deleted before it is looked at. Knows nothing of what the folders hold.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_TRIES = 20
_BETWEEN_S = 0.05


def files_below(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file at any depth with its size in bytes, links not followed, in no order.

    Raises what keeps it from reading a folder that is there; a folder that isn't has no files.
    """
    waiting = [folder]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                else:
                    yield Path(entry.path), entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue


def entries_in(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing when it is not there."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def bytes_below(folder: Path) -> int:
    """How much all files at any depth hold."""
    return sum(size for _, size in files_below(folder))


def largest_file_below(folder: Path) -> int:
    """How much the largest file holds. A download that is copied on its way counts once."""
    return max((size for _, size in files_below(folder)), default=0)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all that is in it, also what others put there meanwhile; it may be gone already.

    Raises OSError when it is still there after a second.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            shutil.rmtree(folder, onerror=_unless_gone)
        except OSError as error:
            # Somebody wrote into it after it was listed, or put another in its place as it was opened, which rmtree
            # takes for a link and says without a number.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, None) or not tries_left:
                raise
        if not os.path.lexists(folder):
            return
        time.sleep(_BETWEEN_S)
    raise OSError(errno.ENOTEMPTY, "it is being written to while it is removed", str(folder))


def _unless_gone(_: Callable[..., object], __: str, failure: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]
