"""Copies a checkpoint's files from the service into a folder: each checked by its hash, continued where a connection
broke, and the folder there whole or not at all.

Knows files and hashes; what an adapter is it doesn't know. Of what the service says no name is trusted.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from uuid import uuid4

import httpx

from art_core.errors import CorruptCheckpoint

from . import wire
from .errors import ServiceRefused, ServiceUnreachable
from .progress import JobProgress
from .service import NOT_TAKEN, Connection, Patience

_PIECE = 2**20
_MOST_ATTEMPTS = 8


async def pull(
    connection: Connection, patience: Patience, model_id: str, step: int, target: Path, progress: JobProgress
) -> Path:
    """Copy the files of a step to `target`, which must be new or empty, or hold them already.

    Raises FileExistsError for a folder that holds something else, CheckpointNotFound, CorruptCheckpoint for a file that
    isn't what its hash says, or whose name leads out of the folder.
    """
    listed = await connection.get(
        wire.CHECKPOINT_FILES.format(model_id=model_id, step=step),
        wire.CheckpointFiles,
        doing=f"asking for the files of step {step}",
    )
    names = {file: _place(file.path) for file in listed.files}
    if await asyncio.to_thread(_there, target, listed.files):
        return target
    temporary = target.with_name(f".{target.name}-{uuid4().hex[:8]}")
    total, done = sum(file.size for file in listed.files), 0
    try:
        for file, name in names.items():
            progress.phase(f"pulling step {step}")
            await _copy(connection, patience, model_id, file, temporary / name, progress, done, total)
            done += file.size
        await asyncio.to_thread(_into_place, temporary, target)
    finally:
        await asyncio.to_thread(shutil.rmtree, temporary, True)
    return target


async def _copy(
    connection: Connection,
    patience: Patience,
    model_id: str,
    file: wire.File,
    to: Path,
    progress: JobProgress,
    before: int,
    total: int,
) -> None:
    await asyncio.to_thread(to.parent.mkdir, parents=True, exist_ok=True)
    have = 0
    path = wire.BLOB.format(model_id=model_id, sha256=file.sha256)
    for attempt in range(1, _MOST_ATTEMPTS + 1):
        try:
            async with connection.download(path, start=have, doing=f"pulling {file.path}") as response:
                if response.status_code == 200:
                    have = 0
                with to.open("ab" if have else "wb") as out:
                    async for piece in response.aiter_bytes(_PIECE):
                        have += len(piece)
                        if have > file.size:
                            raise CorruptCheckpoint(f"{file.path} is longer than the {file.size} bytes it should have.")
                        await asyncio.to_thread(out.write, piece)
                        progress.advance(before + have, total)
            if have == file.size:
                break
        except httpx.TransportError as error:
            if attempt == _MOST_ATTEMPTS:
                raise ServiceUnreachable(
                    f"{file.path} could not be pulled: the connection broke {attempt} times, the last time with"
                    f" {have} of {file.size} bytes here ({error or type(error).__name__}). Nothing was kept."
                ) from error
        except ServiceRefused as error:
            passing = error.status >= 500 or error.status in NOT_TAKEN
            if not passing or attempt == _MOST_ATTEMPTS:
                raise
        await asyncio.sleep(patience.pause(attempt))
    if await asyncio.to_thread(_sha256, to) != file.sha256:
        raise CorruptCheckpoint(
            f"{file.path} is not what the service says it is: its SHA-256 differs. Nothing was kept."
        )


def _place(name: str) -> PurePosixPath:
    place = PurePosixPath(name)
    if place.is_absolute() or not place.parts or {"..", "."} & set(place.parts) or "\\" in name or "\0" in name:
        raise CorruptCheckpoint(
            f"the service names a file {name!r}, which would lie outside of the checkpoint's folder."
        )
    return place


def _there(target: Path, files: Sequence[wire.File]) -> bool:
    """Whether the folder holds exactly these already."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    wanted = {target / _place(file.path): file.sha256 for file in files}
    found = {path for path in target.rglob("*") if path.is_file()} if target.is_dir() else set[Path]()
    if found == set(wanted) and all(_sha256(path) == sha256 for path, sha256 in wanted.items()):
        return True
    raise FileExistsError(f"{target} is there already and isn't this checkpoint. Give another local_path.")


def _into_place(temporary: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rmdir()
    temporary.rename(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
