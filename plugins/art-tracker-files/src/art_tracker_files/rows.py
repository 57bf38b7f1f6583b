"""Trajectory groups as table rows and back, without losing anything.

One row per trajectory and one per rollout that raised; a group's own fields stand on its first row. What is worth a
query has a column of its own: rewards, policy versions, token ids, logprobs. Everything else is JSON.

A lone surrogate, which no UTF-8 has a form for, is escaped: in JSON as JSON does it, and in a column of text for people
to read, beside which `other` holds the text itself.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from art_core import Trajectory, TrajectoryGroup
from art_core.trajectories import as_json

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
        ("other", pa.large_string()),  # fields that have no column, and those whose text no column can hold
        ("group", pa.large_string()),  # on a group's first row: its metrics, metadata, logs
    ]
)
_OF_HISTORY = ("messages_and_choices", "tools")
_COLUMNS = ("reward", "initial_policy_version", "final_policy_version", "logs", "start_time")
_JSON_COLUMNS = ("metrics", "metadata")
_OF_ERROR = ("type", "message", "traceback")


def rows_of(groups: Sequence[TrajectoryGroup], first_index: int = 0) -> tuple[list[Row], list[str]]:
    """The rows of groups, which are numbered from `first_index`, and the problems of trajectories that have none."""
    rows: list[Row] = []
    problems: list[str] = []
    for g, group in enumerate(groups):
        own: list[Row] = []
        for t, trajectory in enumerate(group):
            try:
                own.append(_trajectory_row(trajectory))
            except Exception as error:  # whatever was put in: the others must not pay for it
                where = f"trajectory_groups[{g}].trajectories[{t}]"
                problems.append(f"{where} cannot be written down: {type(error).__name__}: {error}.")
        own += [_error_row({name: getattr(error, name) for name in _OF_ERROR}) for error in group.exceptions]
        own = own or [{"kind": "empty"}]
        own[0]["group"] = _json({name: getattr(group, name) for name in ("metadata", "metrics", "logs")})
        rows += [{"group_index": first_index + g, **row} for row in own]
    return rows, problems


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
            error = {name: row[f"error_{name}"] for name in _OF_ERROR}
            fields["exceptions"].append(error | (json.loads(row["other"]) if row["other"] else {}))
    return [TrajectoryGroup.model_validate(groups[index]) for index in sorted(groups)]


def _trajectory_row(trajectory: Trajectory) -> Row:
    fields, messages = trajectory.for_logging(), _json(as_json(trajectory.messages()))
    histories = [{name: fields.pop(name) for name in _OF_HISTORY}, *fields.pop("additional_histories")]
    row: Row = {"kind": "trajectory", "histories": [_history_cell(history) for history in histories]}
    row |= {name: fields.pop(name) for name in _COLUMNS}
    row |= {name: _json(fields.pop(name)) for name in _JSON_COLUMNS}
    readable = [_readable(line) for line in row["logs"]]
    if readable != row["logs"]:
        fields["logs"], row["logs"] = row["logs"], readable
    row["other"] = _json(fields) if fields else None
    return {**row, "messages": messages}


def _error_row(error: dict[str, str]) -> Row:
    readable = {name: _readable(text) for name, text in error.items()}
    row = {"kind": "exception", **{f"error_{name}": text for name, text in readable.items()}}
    return row if readable == error else {**row, "other": _json(error)}


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
        if _all_of(int, rest.get(name)) and _fit(rest[name]):
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


def _fit(values: list[int]) -> bool:
    try:
        array("q", values)
    except OverflowError:
        return False
    return True


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _readable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
