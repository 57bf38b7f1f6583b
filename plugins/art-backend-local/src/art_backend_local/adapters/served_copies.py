"""Where adapters lie in the form that servers are handed: beside the checkpoints, for as long as one is loaded.

Most adapters are handed over as they are and have no copy. What the form is, the kit knows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.plain_adapter import plain_adapter


def served_folder(checkpoint: Path, base_shapes: LinearShapes, model: Path) -> Path:
    """The folder to hand to a server for a checkpoint that was judged; `model` is the model's folder."""
    return plain_adapter(checkpoint, base_shapes, _copy_of(checkpoint, model))


def forget_served_copy(checkpoint: Path, model: Path) -> None:
    """Remove the copy for a checkpoint that no server holds any more, if there is one."""
    shutil.rmtree(_copy_of(checkpoint, model), ignore_errors=True)


def forget_served_copies(model: Path) -> None:
    """Remove what an earlier host left. Call it only while no server holds an adapter of the model."""
    shutil.rmtree(_copies(model), ignore_errors=True)


def _copies(model: Path) -> Path:
    return model / "served"


def _copy_of(checkpoint: Path, model: Path) -> Path:
    return _copies(model) / checkpoint.name
