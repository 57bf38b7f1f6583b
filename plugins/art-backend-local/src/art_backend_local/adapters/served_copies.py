"""Where adapters lie in the form that servers are handed: beside the checkpoints, for as long as one is loaded.

Most adapters are handed over as they are and have no copy. What the form is, the kit knows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from art_core import CheckpointRef
from art_engine_kit.adapter_config import read_adapter_config
from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.model_folder import ModelFolder
from art_engine_kit.plain_adapter import is_plain, link_adapter, plain_adapter


def served_folder(checkpoint: CheckpointRef, base_shapes: LinearShapes, folder: ModelFolder) -> Path:
    """The folder to hand to a server for a checkpoint that was judged."""
    return plain_adapter(checkpoint.path, base_shapes, _copy_of(checkpoint, folder))


def early_copy(written: Path, checkpoint: CheckpointRef, base_shapes: LinearShapes, folder: ModelFolder) -> Path | None:
    """A place for the adapter in `written`, which is still to become a checkpoint and be renamed; None for one that
    servers can't be handed as it is.
    """
    if not is_plain(read_adapter_config(written), base_shapes):
        return None
    copy = _copy_of(checkpoint, folder)
    link_adapter(written, copy)
    return copy


def forget_served_copy(checkpoint: CheckpointRef, folder: ModelFolder) -> None:
    """Remove the copy for a checkpoint that no server holds any more, if there is one."""
    shutil.rmtree(_copy_of(checkpoint, folder), ignore_errors=True)


def forget_served_copies(folder: ModelFolder) -> None:
    """Remove what an earlier host left. Call it only while no server holds an adapter of the model."""
    shutil.rmtree(folder.served_copies, ignore_errors=True)


def _copy_of(checkpoint: CheckpointRef, folder: ModelFolder) -> Path:
    return folder.served_copies / checkpoint.path.name
