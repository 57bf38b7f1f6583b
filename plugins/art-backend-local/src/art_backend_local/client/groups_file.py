"""The file that carries a step's trajectories to the training worker. Written off the event loop, gone after the
step.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from art_core import TrajectoryGroup
from art_engine_kit.groups_file import write_groups


@asynccontextmanager
async def groups_file(folder: Path, groups: Sequence[TrajectoryGroup]) -> AsyncIterator[Path]:
    """Write the groups to a file of their own in `folder`, give its path, and remove it in the end.

    Raises OSError naming the folder when there is no room for it.
    """
    file, left = folder / f"{uuid4().hex}.groups", threading.Event()
    writing = asyncio.create_task(asyncio.to_thread(_write, file, groups, left), name=f"write {file}")
    try:
        try:
            await asyncio.shield(writing)
        except OSError as error:
            raise OSError(
                f"the step's trajectories could not be written to {folder}: {error}. Nothing was trained and the step"
                " before is still served. Free some space there and train the step again."
            ) from error
        yield file
    finally:
        # Whoever was cancelled meanwhile waits for the thread, which stops at the next group, and leaves nothing.
        left.set()
        await asyncio.gather(writing, return_exceptions=True)
        file.unlink(missing_ok=True)


class _Left(Exception):
    """Nobody waits for the file any more."""


def _write(file: Path, groups: Sequence[TrajectoryGroup], left: threading.Event) -> None:
    def wanted() -> Iterator[TrajectoryGroup]:
        for group in groups:
            if left.is_set():
                raise _Left
            yield group

    file.parent.mkdir(parents=True, exist_ok=True)
    write_groups(file, wanted())
