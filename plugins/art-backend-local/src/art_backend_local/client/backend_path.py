"""Where a backend keeps its files: the folder that was given, or one of its own choice; and whether that can be.

Knows file systems; knows nothing of what is kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from art_core import ArtError

from ..wire.host_files import HOST_FILE, LOCK_FILE


class PathUnusable(ArtError, OSError):
    """A backend can't keep its files where it should; the message says what is in the way."""


def backend_path(given: str | Path | None) -> Path:
    """The folder that was given, absolute, or else `.art` in the root of the git repository around the working folder,
    or in the working folder. Raises PathUnusable when that folder can't be told.
    """
    try:
        return Path(given).expanduser().resolve() if given is not None else _default()
    except (OSError, RuntimeError, ValueError) as error:
        raise PathUnusable(
            f"path={given!r} can't be told: {error}. Give an absolute one: LocalBackend(path=...)"
        ) from error


def make_usable(path: Path) -> None:
    """Make the folder unless it is there. Raises PathUnusable saying what is in the way, and what to do."""
    check_tellable(path, "path")
    instead = "Give another: LocalBackend(path=...)"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(folder for folder in (path, *path.parents) if os.path.lexists(folder) and not folder.is_dir())
        kind = "a file" if file.is_file() else "no folder"
        raise PathUnusable(
            f"{file} is {kind}, and path={path} must be a folder for models and logs. Move it away, or give another"
            " path: LocalBackend(path=...)"
        ) from None
    except OSError as error:
        raise PathUnusable(f"path={path} can't be made: {_reason(error)}. {instead}") from error
    if not os.access(path, os.W_OK | os.X_OK | os.R_OK):
        raise PathUnusable(f"path={path} can't be written by this user{_whose(path)}. {instead}")
    for name in (HOST_FILE, LOCK_FILE):
        if (path / name).exists() and not os.access(path / name, os.R_OK | os.W_OK):
            raise PathUnusable(f"{path / name} can't be read and written by this user{_whose(path / name)}. {instead}")


def check_tellable(path: Path, name: str) -> None:
    """Raise PathUnusable for a path that other processes can't be told of: they read file names as UTF-8."""
    encoding = sys.getfilesystemencoding()
    if not str(path).isascii() and encoding.lower().replace("-", "") != "utf8":
        raise PathUnusable(
            f"{name}={str(path)!r} has other characters than plain letters, and with this locale Python reads file"
            f" names as {encoding}, which the backend's processes don't. Start Python with PYTHONUTF8=1."
        )
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PathUnusable(
            f"{name}={str(path)!r} is no text in UTF-8, so no other process can be told of it. Rename it, or give"
            " another."
        ) from None


def _default() -> Path:
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
    return root / ".art"


def _reason(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else str(error)


def _whose(path: Path) -> str:
    user = os.geteuid()
    owner = path.stat().st_uid
    return f" (user id {user}; it belongs to {owner})" if owner != user else f" (user id {user})"
