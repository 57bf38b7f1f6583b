"""Where a backend keeps its files when nobody said."""

from __future__ import annotations

from pathlib import Path


def default_path() -> Path:
    """`.art` in the root of the git repository around the working folder, or in the working folder."""
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
    return root / ".art"
