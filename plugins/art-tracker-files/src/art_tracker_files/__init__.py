"""What ART logs, in plain files under the model's folder, and how to read it back.

`history.jsonl` holds metrics, one JSON object a line; `trajectories/{split}/{step:04d}.parquet` the trajectories.
"""

from __future__ import annotations

from pathlib import Path

from art_core import TrajectoryGroup
from art_core.history import read_history

__all__ = ["read_history", "read_trajectories"]


def read_trajectories(path: str | Path) -> list[TrajectoryGroup]:
    """The groups in a parquet file, or in every file of a folder in the order of their names, as they were logged.

    Raises FileNotFoundError when there is none, ValueError for a file that is not such a parquet file.
    """
    # Imported here, so that loading the plugin does not import pyarrow.
    from .trajectory_files import read_files

    return read_files(Path(path))
