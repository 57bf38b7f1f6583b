"""Ways to spoil a saved checkpoint, each of which a publisher must notice before anyone is served by it.

Where the spoiled file could have been saved so by a trainer, the manifest is sealed again: its hashes are no help then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from art_engine_kit.checkpoint_folder import ADAPTER_WEIGHTS, MANIFEST, CheckpointManifest, FileRecord, read_manifest

from .tiny_model import change_adapter, write_adapter

Spoil = Callable[[Path, Path], None]


def sealed(folder: Path) -> CheckpointManifest | None:
    """The folder's manifest, None for a backend that keeps checkpoints in a form of its own."""
    return read_manifest(folder) if (folder / MANIFEST).exists() else None


def reseal(folder: Path, manifest: CheckpointManifest | None) -> None:
    """Write the manifest again for what is in the folder now."""
    import hashlib

    if manifest is None:
        return
    files = {}
    for name in manifest.files:
        content = (folder / name).read_bytes()
        files[name] = FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / MANIFEST).write_text(
        manifest.model_copy(update={"files": files}).model_dump_json(indent=1), encoding="utf-8"
    )


def missing(folder: Path, _: Path) -> None:
    """The weights are gone."""
    (folder / ADAPTER_WEIGHTS).unlink()


def empty(folder: Path, _: Path) -> None:
    """The weights' file has no content."""
    manifest = sealed(folder)
    (folder / ADAPTER_WEIGHTS).write_bytes(b"")
    reseal(folder, manifest)


def truncated(folder: Path, _: Path) -> None:
    """Half of the weights' file."""
    manifest = sealed(folder)
    content = (folder / ADAPTER_WEIGHTS).read_bytes()
    (folder / ADAPTER_WEIGHTS).write_bytes(content[: len(content) // 2])
    reseal(folder, manifest)


def wrong_rank(folder: Path, base_model: Path) -> None:
    """A rank far above what was asked for."""
    _replace(folder, base_model, rank=256)


def wrong_width(folder: Path, base_model: Path) -> None:
    """Every lora_A is wider than the layers it belongs to."""
    _replace(folder, base_model, width_error=16)


def not_a_number(folder: Path, _: Path) -> None:
    """One weight is NaN."""
    manifest = sealed(folder)

    def change(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values())).flat[3] = np.nan

    change_adapter(folder, change)
    reseal(folder, manifest)


def other_base(folder: Path, _: Path) -> None:
    """An adapter for a model with more layers, under other names."""
    manifest = sealed(folder)

    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace("layers.0.", "layers.97.")] = tensors.pop(name)

    change_adapter(folder, change)
    reseal(folder, manifest)


def other_weights(folder: Path, base_model: Path) -> None:
    """A sound adapter, but another one: only the canary can tell."""
    _replace(folder, base_model, strength=0.7)


SPOILED: dict[str, Spoil] = {
    "missing": missing,
    "empty": empty,
    "truncated": truncated,
    "wrong rank": wrong_rank,
    "wrong width": wrong_width,
    "NaN": not_a_number,
    "other base": other_base,
}


def _replace(folder: Path, base_model: Path, **settings: Any) -> None:
    manifest = sealed(folder)
    before = json.loads((folder / "adapter_config.json").read_bytes())
    own = {"seed": 99, "rank": before["r"], **settings}
    write_adapter(folder, base_model, **own)
    reseal(folder, manifest)
