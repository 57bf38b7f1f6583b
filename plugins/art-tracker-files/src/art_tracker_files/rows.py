"""Trajectory groups as table rows and back, without losing anything.

One row per trajectory and one per rollout that raised; a group's own fields stand on its first row. What is worth a
query has a column of its own: rewards, policy versions, token ids, logprobs. Everything else is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from art_core import TrajectoryGroup

Row = dict[str, Any]

_ITEM = pa.struct(
    [
        ("json", pa.large_string()),
        ("token_ids", pa.list_(pa.int64())),
        ("prompt_token_ids", pa.list_(pa.int64())),
        ("logprobs", pa.list_(pa.float64())),
    ]
)
_HISTORY = pa.struct([("items", pa.list_(_ITEM)), ("tools", pa.large_string())])
SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # "trajectory", "exception", or "empty" for a group that holds neither
        ("group_index", pa.int64()),
        ("reward", pa.float64()),
        ("initial_policy_version", pa.int64()),
        ("final_policy_version", pa.int64()),
        ("metrics", pa.large_string()),
        ("metadata", pa.large_string()),
        ("messages", pa.large_string()),  # the conversation as request messages, to be read by people
        ("logs", pa.list_(pa.large_string())),
        ("start_time", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.large_string()),
        ("error_traceback", pa.large_string()),
        ("histories", pa.list_(_HISTORY)),  # the trajectory's own history, then its additional ones, in full
        ("other", pa.large_string()),  # fields of a trajectory that have no column
        ("group", pa.large_string()),  # on a group's first row: its metrics, metadata, logs
    ]
)
_OF_HISTORY = ("messages_and_choices", "tools")
_COLUMNS = ("reward", "initial_policy_version", "final_policy_version", "logs", "start_time")
_JSON_COLUMNS = ("metrics", "metadata")


def rows_of(groups: Sequence[TrajectoryGroup], first_index: int = 0) -> list[Row]:
    """The rows of groups, which are numbered from `first_index`."""
    rows: list[Row] = []
    for index, group in enumerate(groups, first_index):
        own: list[Row] = [_trajectory_row(trajectory.for_logging()) for trajectory in group]
        for trajectory, row in zip(group, own, strict=True):
            row["messages"] = _json(trajectory.messages())
        own += [
            {
                "kind": "exception",
                "error_type": error.type,
                "error_message": error.message,
                "error_traceback": error.traceback,
            }
            for error in group.exceptions
        ]
        own = own or [{"kind": "empty"}]
        own[0]["group"] = _json(group.model_dump(mode="json", exclude={"trajectories", "exceptions"}))
        rows += [{"group_index": index, **row} for row in own]
    return rows


def groups_of(rows: Iterable[Row]) -> list[TrajectoryGroup]:
    """The groups that `rows_of` was given, in the same order."""
    groups: dict[int, dict[str, Any]] = {}
    for row in rows:
        fields = groups.setdefault(row["group_index"], {"trajectories": [], "exceptions": []})
        if row["group"] is not None:
            fields.update(json.loads(row["group"]))
        if row["kind"] == "trajectory":
            fields["trajectories"].append(_trajectory_of(row))
        elif row["kind"] == "exception":
            fields["exceptions"].append(
                {"type": row["error_type"], "message": row["error_message"], "traceback": row["error_traceback"]}
            )
    return [TrajectoryGroup.model_validate(groups[index]) for index in sorted(groups)]


def _trajectory_row(fields: dict[str, Any]) -> Row:
    histories = [{name: fields.pop(name) for name in _OF_HISTORY}, *fields.pop("additional_histories")]
    row: Row = {"kind": "trajectory", "histories": [_history_cell(history) for history in histories]}
    row |= {name: fields.pop(name) for name in _COLUMNS}
    row |= {name: _json(fields.pop(name)) for name in _JSON_COLUMNS}
    row["other"] = _json(fields) if fields else None
    return row


def _trajectory_of(row: Row) -> dict[str, Any]:
    first, *additional = [_history_of(cell) for cell in row["histories"]]
    fields: dict[str, Any] = {name: row[name] for name in _COLUMNS}
    fields |= {name: json.loads(row[name]) for name in _JSON_COLUMNS}
    fields |= json.loads(row["other"]) if row["other"] else {}
    return {**fields, **first, "additional_histories": additional}


def _history_cell(history: dict[str, Any]) -> dict[str, Any]:
    items = [_item_cell(item) for item in history["messages_and_choices"]]
    tools = history["tools"]
    return {"items": items, "tools": None if tools is None else _json(tools)}


def _history_of(cell: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages_and_choices": [_item_of(item) for item in cell["items"]],
        "tools": None if cell["tools"] is None else json.loads(cell["tools"]),
    }


def _item_cell(item: dict[str, Any]) -> dict[str, Any]:
    """A message or a choice: its long lists of numbers in columns, the rest as JSON."""
    rest, cell = dict(item), {}
    for name in ("token_ids", "prompt_token_ids"):
        if _all_of(int, rest.get(name)):
            cell[name] = rest.pop(name)
    content = (rest.get("logprobs") or {}).get("content") if isinstance(rest.get("logprobs"), dict) else None
    if content is not None and _all_of(float, [token.get("logprob") for token in content]):
        cell["logprobs"] = [token["logprob"] for token in content]
        without = [{name: value for name, value in token.items() if name != "logprob"} for token in content]
        rest["logprobs"] = {**rest["logprobs"], "content": without}
    return {"json": _json(rest), **cell}


def _item_of(cell: dict[str, Any]) -> dict[str, Any]:
    item: dict[str, Any] = json.loads(cell["json"])
    for name in ("token_ids", "prompt_token_ids"):
        if cell[name] is not None:
            item[name] = cell[name]
    if cell["logprobs"] is not None:
        content = item["logprobs"]["content"]
        for token, logprob in zip(content, cell["logprobs"], strict=True):
            token["logprob"] = logprob
    return item


def _all_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    raise TypeError(f"a trajectory holds a {type(value).__name__}, which cannot be written as JSON")
