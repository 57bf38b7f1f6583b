"""Reads a job's trajectory groups without building an object for every token.

The file was written, and its content checked, by `art_engine_kit.groups_file.write_groups`; choices stay as the JSON
they are, which `tokenize` takes as well. Knows that one file format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import from_json

from art_core.trajectories import History, Trajectory, TrajectoryGroup


def read_groups_fast(path: Path) -> list[TrajectoryGroup]:
    """What `art_engine_kit.groups_file.read_groups` reads, for tokenizing only: messages and choices are plain
    dictionaries.
    """
    return [
        TrajectoryGroup.model_construct(
            **{**group, "trajectories": [_trajectory(fields) for fields in group["trajectories"]]}
        )
        for group in from_json(path.read_bytes())
    ]


def _trajectory(fields: dict[str, Any]) -> Trajectory:
    histories = [History.model_construct(**history) for history in fields["additional_histories"]]
    return Trajectory.model_construct(**{**fields, "additional_histories": histories})
