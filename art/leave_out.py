"""Leaves out of groups what can't be kept, each value named, so that it costs nothing but itself.

Knows trajectories; what can't be kept, the kernel says. Warns of nothing itself.
"""

from __future__ import annotations

from typing import Any

from art_core import History, Trajectory, TrajectoryGroup
from art_core.trajectories import as_json, unsound_values

_ITEMS = "messages_and_choices"


def without_unsound(group: TrajectoryGroup, where: str) -> tuple[TrajectoryGroup, list[str]]:
    """The group, or a copy without what can't be kept, and the problems of all that is left out.

    A reward stays, whatever it is, and so does a message with a value that JSON has no form for: as the value's repr.
    """
    group, said = without_unsound_fields(group, where)
    kept: list[Trajectory] = []
    for t, trajectory in enumerate(group.trajectories):
        problems = [p for p in unsound_values(trajectory, f"{where}.trajectories[{t}]") if p[0] != "reward"]
        said += [problem for _, _, problem in problems]
        if isinstance(trajectory, Trajectory):
            kept.append(_kept(trajectory, {(field, name) for field, name, _ in problems}) if problems else trajectory)
    return (group.model_copy(update={"trajectories": kept}) if said else group), said


def without_unsound_fields(group: TrajectoryGroup, where: str) -> tuple[TrajectoryGroup, list[str]]:
    """The same for what a group has of its own; its trajectories are not looked at."""
    problems = unsound_values(group, where)
    if not problems:
        return group, []
    update = _measured(group, {(field, name) for field, name, _ in problems})
    return group.model_copy(update=update), [problem for _, _, problem in problems]


def _kept(trajectory: Trajectory, unsound: set[tuple[str, Any]]) -> Trajectory:
    own, *additional = [
        [
            _in_words(item) if (_ITEMS, (h, i)) in unsound else item
            for i, item in enumerate(history.messages_and_choices)
            if (_ITEMS, (h, i)) not in unsound or (isinstance(item, dict) and "role" in item)
        ]
        for h, history in enumerate(trajectory.histories())
    ]
    histories: list[History] = [
        history.model_copy(update={_ITEMS: items})
        for history, items in zip(trajectory.additional_histories, additional, strict=True)
    ]
    measured = _measured(trajectory, unsound)
    return trajectory.model_copy(update={**measured, _ITEMS: own, "additional_histories": histories})


def _measured(item: Trajectory | TrajectoryGroup, unsound: set[tuple[str, Any]]) -> dict[str, Any]:
    return {
        "metrics": {name: value for name, value in item.metrics.items() if ("metrics", name) not in unsound},
        "metadata": {name: value for name, value in item.metadata.items() if ("metadata", name) not in unsound},
        "logs": [line for i, line in enumerate(item.logs) if ("logs", i) not in unsound],
    }


def _in_words(message: Any) -> Any:
    return {name: _or_words(value) for name, value in message.items()}


def _or_words(value: Any) -> Any:
    try:
        return as_json(value)
    except (TypeError, ValueError):
        try:
            return repr(value)
        except Exception:
            return object.__repr__(value)
