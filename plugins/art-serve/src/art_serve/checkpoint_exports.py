"""Checkpoints' adapter folders as clients fetch them: copied out of the backend once, and found by what is in them.

Knows the backend's `pull_checkpoint` and files; no HTTP. The last few stay; one that has gone is copied out again.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakValueDictionary

from art_backend_serverless import wire

from .hosted_backend import HostedBackend
from .model_records import ModelRecord

_MOST = 16


class CheckpointExports:
    """Folders `folder/MODEL/STEP`, of ids and numbers only."""

    def __init__(self, backend: HostedBackend, folder: Path) -> None:
        self._backend = backend
        self._folder = folder
        self._listed: dict[Path, list[wire.File]] = {}
        self._turns: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()

    async def files(self, record: ModelRecord, step: int) -> list[wire.File]:
        """The files of a step, copied out unless they are. Raises what the backend raises."""
        place = self._place(record, step)
        lock = self._turns.setdefault(place, asyncio.Lock())
        async with lock:
            if not await asyncio.to_thread(place.is_dir):
                await self._backend.registered(record)
                await asyncio.to_thread(self._make_room)
                await self._backend.backend.pull_checkpoint(self._backend.policy(record), step=step, local_path=place)
            return await asyncio.to_thread(self._list, place)

    async def blob(self, record: ModelRecord, sha256: str) -> Path | None:
        """The file of this content among what was copied out of a model."""
        return await asyncio.to_thread(self._find, self._folder / record.id, sha256)

    async def forget(self, record: ModelRecord, steps: Iterable[int] | None = None) -> None:
        """Remove the copies of steps that are gone, or of a model."""
        model = self._folder / record.id
        places = [model] if steps is None else [self._place(record, step) for step in steps]
        for place in places:
            await asyncio.to_thread(shutil.rmtree, place, True)
            for listed in [listed for listed in self._listed if listed.is_relative_to(place)]:
                del self._listed[listed]

    def _place(self, record: ModelRecord, step: int) -> Path:
        return self._folder / record.id / f"{step:04d}"

    def _list(self, place: Path) -> list[wire.File]:
        if place not in self._listed:
            found = sorted(file for file in place.rglob("*") if file.is_file())
            self._listed[place] = [
                wire.File(path=str(file.relative_to(place)), size=file.stat().st_size, sha256=_hash_of(file))
                for file in found
            ]
        return self._listed[place]

    def _find(self, model: Path, sha256: str) -> Path | None:
        if not model.is_dir():
            return None
        for place in sorted(model.iterdir(), reverse=True):
            if not place.name.isdigit():
                continue
            for file in self._list(place):
                if file.sha256 == sha256 and (place / file.path).is_file():
                    return place / file.path
        return None

    def _make_room(self) -> None:
        there = sorted(self._folder.glob("*/*"), key=lambda place: place.stat().st_mtime)
        for place in there[: max(0, len(there) - _MOST + 1)]:
            # One that is being read stays readable until it is closed.
            shutil.rmtree(place, ignore_errors=True)
            self._listed.pop(place, None)


def _hash_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
