"""What clients sent, on disk until it is used: the bodies of training jobs, and files to train on.

Every name is made here of hashes and of ids that were checked; nothing that a client writes becomes part of a path.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

UPLOAD_SCHEME = "art-upload:///"
_TEMPORARY = ".arriving-"
_WRITTEN_AT_ONCE = 2**20
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Arrived:
    """A body that came whole, in a file that goes unless it is kept."""

    file: Path
    sha256: str
    size: int


class KeptFiles:
    """Both kinds, each in a folder of its own under `folder`. What isn't a coroutine blocks."""

    def __init__(self, folder: Path) -> None:
        self._jobs = folder / "jobs"
        self._uploads = folder / "uploads"
        for each in (self._jobs, self._uploads):
            each.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def arriving(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[Arrived]:
        """Take a body in, piece by piece, to disk. On leaving nothing is left of one that wasn't kept."""
        file = self._jobs / f"{_TEMPORARY}{uuid4().hex}"
        digest, size, written = hashlib.sha256(), 0, 0
        waiting: list[bytes] = []
        try:
            with await asyncio.to_thread(file.open, "wb") as opened:

                def write(pieces: list[bytes]) -> None:
                    for piece in pieces:
                        digest.update(piece)
                        opened.write(piece)

                async for piece in pieces:
                    size += len(piece)
                    waiting.append(piece)
                    if size - written >= _WRITTEN_AT_ONCE:
                        await asyncio.to_thread(write, waiting)
                        waiting, written = [], size
                await asyncio.to_thread(write, waiting)
                opened.flush()
                await asyncio.to_thread(os.fsync, opened.fileno())
            yield Arrived(file, digest.hexdigest(), size)
        finally:
            file.unlink(missing_ok=True)

    def keep_job(self, arrived: Arrived, model_id: str, idempotency_key: str) -> str:
        """Keep the body of a job; gives its name, which is the same for the same body under the same key."""
        what = "\n".join((model_id, idempotency_key, arrived.sha256))
        name = hashlib.sha256(what.encode()).hexdigest()
        arrived.file.replace(self._jobs / name)
        return name

    def read_job(self, name: str) -> bytes:
        """The body of a job."""
        return (self._jobs / name).read_bytes()

    def forget_job(self, name: str) -> None:
        """The job has ended."""
        (self._jobs / name).unlink(missing_ok=True)

    def keep_upload(self, arrived: Arrived, entity: str) -> str:
        """Keep a file of an entity; gives its URL."""
        folder = self._uploads / entity
        folder.mkdir(exist_ok=True)
        arrived.file.replace(folder / arrived.sha256)
        return f"{UPLOAD_SCHEME}{entity}/{arrived.sha256}"

    def upload(self, entity: str, url: str) -> Path | None:
        """Where the file of a URL lies, if it is this entity's and there."""
        prefix = f"{UPLOAD_SCHEME}{entity}/"
        name = url.removeprefix(prefix)
        if not url.startswith(prefix) or not _HASH.fullmatch(name):
            return None
        path = self._uploads / entity / name
        return path if path.is_file() else None

    def sweep(self, *, needed: Collection[str], upload_age_s: float) -> None:
        """Remove bodies that no job needs, what never arrived whole, and uploads that are older than they are kept."""
        for file in self._jobs.iterdir():
            if file.name not in needed:
                file.unlink(missing_ok=True)
        oldest = time.time() - upload_age_s
        for file in self._uploads.glob("*/*"):
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)
