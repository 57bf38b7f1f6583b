"""What clients sent, on disk until it is used: the bodies of training jobs, and files to train on.

Every name is made here of hashes and of ids that were checked; nothing that a client writes becomes part of a path.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from art_core.atomic_files import write_atomically

UPLOAD_SCHEME = "art-upload:///"
_TEMPORARY = ".arriving-"


@dataclass(frozen=True)
class KeptUpload:
    """A file that was sent whole."""

    url: str
    sha256: str
    size: int


class KeptFiles:
    """Both kinds, each in a folder of its own under `folder`. Calls block."""

    def __init__(self, folder: Path) -> None:
        self._jobs = folder / "jobs"
        self._uploads = folder / "uploads"
        for each in (self._jobs, self._uploads):
            each.mkdir(parents=True, exist_ok=True)

    def keep_job(self, model_id: str, idempotency_key: str, body: bytes) -> str:
        """Keep the body of a job; gives its name, which is the same for the same body under the same key."""
        what = (model_id, idempotency_key, hashlib.sha256(body).hexdigest())
        name = hashlib.sha256("\n".join(what).encode()).hexdigest()
        path = self._jobs / name
        if not path.exists():
            write_atomically(path, body)
        return name

    def read_job(self, name: str) -> bytes:
        """The body of a job."""
        return (self._jobs / name).read_bytes()

    def forget_job(self, name: str) -> None:
        """The job has ended."""
        (self._jobs / name).unlink(missing_ok=True)

    def sweep(self, *, needed: Collection[str], upload_age_s: float) -> None:
        """Remove bodies that no job needs, what never arrived whole, and files that are older than they are kept."""
        for file in self._jobs.iterdir():
            if file.name not in needed:
                file.unlink(missing_ok=True)
        oldest = time.time() - upload_age_s
        for file in self._uploads.rglob("*"):
            if file.is_file() and (file.name.startswith(_TEMPORARY) or file.stat().st_mtime < oldest):
                file.unlink(missing_ok=True)

    async def keep_upload(self, entity: str, chunks: AsyncIterator[bytes]) -> KeptUpload:
        """Keep a file of an entity while it arrives. Nothing stays of one that doesn't arrive whole."""
        folder = self._uploads / entity
        folder.mkdir(exist_ok=True)
        temporary = folder / f"{_TEMPORARY}{uuid4().hex}"
        digest, size = hashlib.sha256(), 0
        try:
            with temporary.open("wb") as file:
                async for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            sha256 = digest.hexdigest()
            temporary.replace(folder / sha256)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return KeptUpload(f"{UPLOAD_SCHEME}{entity}/{sha256}", sha256, size)

    def upload(self, entity: str, url: str) -> Path | None:
        """Where the file of a URL lies, if it is this entity's and there."""
        prefix = f"{UPLOAD_SCHEME}{entity}/"
        name = url.removeprefix(prefix)
        if not url.startswith(prefix) or len(name) != 64 or set(name) - set("0123456789abcdef"):
            return None
        path = self._uploads / entity / name
        return path if path.is_file() else None
