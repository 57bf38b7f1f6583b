"""Where ART keeps what belongs to the user and to no run: the cache, the list of running hosts, a home for processes.

That is the home folder, as usual on the platform. A container's user may have none, or one that can't be written: then
a folder of the user's own beside other temporary files stands in. Knows no file in these folders.
"""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "ART_CACHE_DIR"


def cache_dir() -> Path:
    """ART's cache folder: `ART_CACHE_DIR`, read at each call, or the user's cache folder of this platform.

    Where that can't be written, a folder beside other temporary files, said once in a warning. Not made here.
    """
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return Path(os.path.abspath(Path(override).expanduser()))
    return _usual_or(platformdirs.user_cache_dir, ".cache", "models and engines' environments are kept")


def state_dir() -> Path:
    """Where the list of running hosts is. Like `cache_dir`, without the variable."""
    return _usual_or(platformdirs.user_state_dir, ".local/state", "the list of running hosts is kept")


def home_for_processes() -> Path | None:
    """The home that our processes are given instead of the user's, which they can't use; None when they can."""
    home = os.path.expanduser("~")
    return None if os.path.isabs(home) and can_be_written(Path(home)) else stand_in() / "home"


def stand_in() -> Path:
    """This user's folder beside other temporary files. Raises OSError when there is none, or it is somebody else's."""
    folder = Path(tempfile.gettempdir()) / f"art-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is no folder of this user's alone. Remove it, or set {CACHE_VARIABLE}.")
    return folder


def can_be_written(folder: Path) -> bool:
    """Whether something can be made in a folder, or the folder itself can be made. Makes nothing."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _usual_or(usual: Callable[[str], str], name: str, what: str) -> Path:
    try:
        folder = Path(usual("art"))
        why = f"{folder} can't be written"
        if can_be_written(folder):
            return folder
    except RuntimeError as error:
        why = str(error)
    # Where our processes look too: this is their home, and they don't have the variable that is at fault.
    folder = (home_for_processes() or Path(os.path.expanduser("~"))) / name / "art"
    # Python says it once.
    warnings.warn(
        f"{why[:1].upper()}{why[1:]}. So {what} in {folder}. Set HOME to a folder that can be written, or"
        f" {CACHE_VARIABLE} for the cache alone.",
        RuntimeWarning,
        stacklevel=3,
    )
    return folder
