"""The file that carries a step's trajectories to the training worker. Written off the event loop, gone after the
step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from art_core import TrajectoryGroup
from art_core.atomic_files import write_atomically
from art_engine_kit.groups_file import write_groups


@asynccontextmanager
async def groups_file(folder: Path, groups: Sequence[TrajectoryGroup]) -> AsyncIterator[Path]:
    """Write the groups to a file of their own in `folder`, give its path, and remove it in the end.

    Raises OSError naming the folder when there is no room for it.
    """
    file = folder / f"{uuid4().hex}.json"
    try:
        await asyncio.to_thread(_write, file, list(groups))
    except OSError as error:
        raise OSError(
            f"the step's trajectories could not be written to {folder}: {error}. Nothing was trained and the step"
            " before is still served. Free some space there and train the step again."
        ) from error
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _write(file: Path, groups: list[TrajectoryGroup]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, write_groups(groups))
