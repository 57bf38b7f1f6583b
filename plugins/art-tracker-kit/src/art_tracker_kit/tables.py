"""Trajectories as a small table for people to read. Knows trajectories and no library that shows tables.

What is whole is kept by `art-tracker-files`; here a step has at most `ROWS` rows and a cell at most `TEXT` characters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from art_core import Trajectory, TrajectoryGroup

ROWS = 100
TEXT = 2000
COLUMNS = ("group", "reward", "initial_policy_version", "final_policy_version", "conversation", "metrics", "error")

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under `COLUMNS`, and how many trajectories and exceptions there were before it was cut."""

    rows: tuple[tuple[Cell, ...], ...]
    total: int


def table_of(groups: Sequence[TrajectoryGroup]) -> Table:
    """The table of a step. When there are more than `ROWS`, those are taken at even distances, so that every part of
    the step is seen; a longer text keeps its beginning and its end.
    """
    everything: list[tuple[int, Trajectory | str]] = []
    for number, group in enumerate(groups):
        everything += [(number, trajectory) for trajectory in group]
        everything += [(number, f"{error.type}: {error.message}") for error in group.exceptions]
    total = len(everything)
    taken = everything if total <= ROWS else [everything[i * total // ROWS] for i in range(ROWS)]
    return Table(tuple(_row(number, what) for number, what in taken), total)


def _row(group: int, what: Trajectory | str) -> tuple[Cell, ...]:
    if isinstance(what, str):
        return (group, None, None, None, "", "", _cut(what))
    return (
        group,
        what.reward,
        what.initial_policy_version,
        what.final_policy_version,
        _cut(_conversation(what)),
        _cut(json.dumps(what.metrics, default=str)),
        "",
    )


def _conversation(trajectory: Trajectory) -> str:
    parts = []
    for message in trajectory.messages():
        calls = message.get("tool_calls")
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content, default=str) if content else ""
        parts.append(f"{message['role']}: {text}{json.dumps(calls, default=str) if calls else ''}")
    return "\n\n".join(parts)


def _cut(text: str) -> str:
    # A lone surrogate has no form in UTF-8, which is what every library here writes.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= TEXT:
        return text
    kept = TEXT // 2 - 20
    return f"{text[:kept]} [... {len(text) - 2 * kept} characters ...] {text[-kept:]}"
