"""What a checkpoint is on disk: a folder with a PEFT adapter, the optimizer's state, a canary, and a manifest.

The manifest is written last, into a temporary folder that is then renamed, so a folder with a manifest that matches is
complete and one without is not a checkpoint. Knows files and JSON; reads no tensor and imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from art_core.atomic_files import write_atomically
from art_core.errors import CorruptCheckpoint

from .live_folders import entries_in, remove_folder

MANIFEST = "checkpoint.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# In the format of safetensors, and not called so: SGLang, for one, reads every *.safetensors of an adapter folder as
# the adapter, and a moment of the optimizer has the name of the weight that it belongs to.
OPTIMIZER_STATE = "optimizer.state"
_TEMPORARY = ".saving-"
# A metric may be NaN or infinite; written as null it could not be read back.
_JSON = ConfigDict(frozen=True, defer_build=True, ser_json_inf_nan="constants")


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    size: int
    sha256: str


class CheckpointManifest(BaseModel):
    """What `checkpoint.json` says. `files` covers every other file of the folder, by its path within it."""

    model_config = _JSON

    format: Literal[1] = 1
    step: int
    base_model: str
    engine: str
    metrics: dict[str, float] = {}
    files: dict[str, FileRecord]


def step_folder(checkpoints: Path, step: int) -> Path:
    """`checkpoints/0042` for step 42."""
    return checkpoints / f"{step:04d}"


@contextmanager
def saving(
    destination: Path,
    *,
    step: int,
    base_model: str,
    engine: str,
    metrics: dict[str, float] | None = None,
    sealed: Mapping[str, FileRecord] | None = None,
) -> Iterator[Path]:
    """Give a temporary folder to write a checkpoint into; on leaving, seal it and rename it to `destination`.

    `sealed` may be filled on the way with what `seal` gave of files, by their path, that aren't touched any more;
    the others are read on leaving. A kill at any moment leaves either the whole checkpoint or none. An error inside
    removes the temporary folder. Raises FileExistsError when `destination` is already a whole checkpoint, or has
    become one when it is left; a corrupt one in its place is moved aside.
    """
    if destination.exists():
        try:
            read_manifest(destination)
        except CorruptCheckpoint:
            set_aside(destination)
        else:
            raise FileExistsError(f"{destination} already holds a checkpoint; a step is never written twice")
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.parent / f"{_TEMPORARY}{destination.name}-{os.getpid()}-{uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
        written = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        known = sealed or {}
        files = {name: known[name] if name in known else file_record(file) for name, file in written.items()}
        manifest = CheckpointManifest(
            step=step, base_model=base_model, engine=engine, metrics=metrics or {}, files=files
        )
        write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        try:
            folder.rename(destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(f"{destination} was saved by another writer meanwhile; theirs is kept") from error
        _sync(destination.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def read_manifest(folder: Path, *, hashes: bool = False) -> CheckpointManifest:
    """Read a checkpoint's manifest and hold the folder against it: every file there, with its size (and hash, if
    asked).

    Raises CorruptCheckpoint saying what is wrong with which file.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        reason = (
            "it has no manifest" if isinstance(error, FileNotFoundError) else f"its manifest cannot be read ({error})"
        )
        raise CorruptCheckpoint(f"{folder} is not a whole checkpoint: {reason}.") from error
    if _step_of(folder) not in (None, manifest.step):
        raise CorruptCheckpoint(f"{folder} is not a whole checkpoint: its manifest says step {manifest.step}.")
    for name, record in manifest.files.items():
        file = folder / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise CorruptCheckpoint(f"{folder} is not a whole checkpoint: {name} cannot be read ({error}).") from error
        if size != record.size:
            raise CorruptCheckpoint(
                f"{folder} is not a whole checkpoint: {name} has {size} bytes where its manifest says {record.size}."
            )
        if hashes and file_record(file) != record:
            raise CorruptCheckpoint(
                f"{folder} is not a whole checkpoint: {name} differs from what was saved (SHA-256)."
            )
    return manifest


def whole_steps(checkpoints: Path) -> dict[int, Path]:
    """Every whole checkpoint under a model's `checkpoints` folder, by step, oldest first.

    A corrupt one is named in a warning and skipped; nothing is deleted.
    """
    found: dict[int, Path] = {}
    for folder in entries_in(checkpoints):
        step = _step_of(folder)
        if step is None or not folder.is_dir():
            continue
        try:
            read_manifest(folder)
        except CorruptCheckpoint as error:
            if not folder.exists():
                continue  # it was deleted meanwhile
            warnings.warn(f"{error} It is skipped and kept as it is.", RuntimeWarning, stacklevel=2)
        else:
            found[step] = folder
    return dict(sorted(found.items()))


def remove_unfinished(checkpoints: Path) -> list[Path]:
    """Remove the temporary folders that killed writers left, and say which they were. Call it only when no writer
    runs.
    """
    left = [folder for folder in entries_in(checkpoints) if folder.name.startswith(_TEMPORARY)]
    for folder in left:
        remove_folder(folder)
    return left


def set_aside(folder: Path) -> Path:
    """Rename a corrupt folder so that its step can be written again; nothing of it is lost."""
    aside = folder.with_name(f"{folder.name}.corrupt-{uuid4().hex[:8]}")
    folder.rename(aside)
    warnings.warn(f"{folder} was not a whole checkpoint and is kept as {aside.name}.", RuntimeWarning, stacklevel=2)
    return aside


def seal(file: Path) -> FileRecord:
    """Sync a file that nobody writes to any more, and hash it, while other files of its checkpoint are still made."""
    _sync(file)
    return file_record(file)


def file_record(file: Path) -> FileRecord:
    """Read and hash a file; call it off the event loop."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(size=file.stat().st_size, sha256=digest)


def _step_of(folder: Path) -> int | None:
    """The step that a folder's name says, None for a name that `step_folder` never gives."""
    if not re.fullmatch(r"[0-9]{4,18}", folder.name):
        return None
    step = int(folder.name)
    return step if step_folder(folder.parent, step).name == folder.name else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
