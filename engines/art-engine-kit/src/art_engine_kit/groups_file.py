"""The file in which a step's trajectory groups reach a training worker. Nothing of a trajectory is dropped."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from art_core import TrajectoryGroup

_GROUPS: TypeAdapter[list[TrajectoryGroup]] = TypeAdapter(
    list[TrajectoryGroup], config=ConfigDict(ser_json_inf_nan="constants")
)


def write_groups(groups: list[TrajectoryGroup]) -> bytes:
    """The content of a job's `groups_file`: nothing of a trajectory is dropped."""
    return _GROUPS.dump_json(groups)


def read_groups(path: Path) -> list[TrajectoryGroup]:
    """Read what `write_groups` wrote."""
    return _GROUPS.validate_json(path.read_bytes())
