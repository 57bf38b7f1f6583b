"""A trajectory group as JSON and back, without the token ids and logprobs that its records hold already.

Nothing else is left out: every field, every number, every extra of a choice comes back as it was. Knows no file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
from pydantic import BaseModel
from pydantic_core import from_json, to_json

from art_core import History, TrajectoryGroup
from art_core.errors import InvalidTrajectory
from art_core.trajectories import as_json, as_number, is_choice

from .group_records import LOGPROB, TOKEN_ID, HistoryRecord, Sample, TrajectoryRecord, samples_of

JSON = dict[str, Any]
_IN_RECORDS = {"token_ids", "prompt_token_ids", "logprobs"}


def group_to_text(group: TrajectoryGroup, records: Sequence[TrajectoryRecord], *, where: str) -> bytes:
    """Raises InvalidTrajectory, naming group, trajectory and item, for a value that JSON cannot hold."""
    fields = _fields(group, without="trajectories") | {"exceptions": [vars(error) for error in group.exceptions]}
    trajectories = []
    for t, (trajectory, record) in enumerate(zip(group, records, strict=True)):
        own, *additional = (
            _fields(history, without="messages_and_choices") | {"messages_and_choices": _items(history, known)}
            for history, known in zip(trajectory.histories(), record.histories, strict=True)
        )
        own["additional_histories"] = additional
        trajectories.append(_dump(own, f"{where}.trajectories[{t}]"))
    # One object, into which the trajectories go as the text that they are already.
    return _dump(fields, where)[:-1] + b',"trajectories":[' + b",".join(trajectories) + b"]}"


def group_from_text(text: bytes, records: Sequence[TrajectoryRecord]) -> TrajectoryGroup:
    """The group that `group_to_text` was given. Raises ValueError for what is no such text."""
    fields: JSON = _load(text)
    for trajectory, record in zip(fields["trajectories"], records, strict=True):
        for history, known in zip([trajectory, *trajectory["additional_histories"]], record.histories, strict=True):
            for sample in (sample for row in known.rows for sample in samples_of(row)):
                _put_back(sample, history["messages_and_choices"][sample.item])
    return TrajectoryGroup.model_validate(fields)


def _put_back(sample: Sample, choice: JSON) -> None:
    choice["prompt_token_ids"] = np.frombuffer(sample.prompt, TOKEN_ID).tolist()
    choice["token_ids"] = np.frombuffer(sample.token_ids, TOKEN_ID).tolist()
    table = (choice["logprobs"] or {}).get("content")
    if isinstance(table, dict):
        table["logprob"] = np.frombuffer(sample.logprobs or b"", LOGPROB).tolist()
        entries = zip(*table.values(), strict=True)
        choice["logprobs"]["content"] = [dict(zip(table, entry, strict=True)) for entry in entries]


def _fields(value: BaseModel, *, without: str) -> JSON:
    return {name: getattr(value, name) for name in type(value).model_fields if name != without}


def _items(history: History, record: HistoryRecord) -> list[Any]:
    known = {span.item for row in record.rows for span in row.spans}
    return [
        _choice(item, known=i in known) if is_choice(item) else item
        for i, item in enumerate(history.messages_and_choices)
    ]


def _choice(choice: Any, *, known: bool) -> Any:
    if not known:
        return _plain(choice)
    fields = choice.model_dump(mode="python", warnings=False, exclude=_IN_RECORDS)
    logprobs: Any = getattr(choice, "logprobs", None)
    table = _table(getattr(logprobs, "content", None) or ())
    if table is None:
        return fields | {"logprobs": _plain(logprobs)}
    rest = logprobs.model_dump(mode="python", warnings=False, exclude={"content"})
    return fields | {"logprobs": rest | {"content": table}}


def _table(entries: Sequence[Any]) -> JSON | None:
    """Tokens' entries as one list for each field but the logprob; None where that would lose something.

    There is an entry for every token: as objects they would take most of the time and of the room.
    """
    kinds = set(map(type, entries))
    if len(kinds) != 1 or not issubclass(kinds.pop(), BaseModel) or any(map(attrgetter("__pydantic_extra__"), entries)):
        return None
    rows = list(map(vars, entries))
    names = set(map(tuple, rows))
    if len(names) != 1 or set(map(type, map(itemgetter("logprob"), rows))) != {float}:
        return None
    table = {name: list(map(itemgetter(name), rows)) for name in names.pop() if name != "logprob"}
    if any(table["top_logprobs"]):
        table["top_logprobs"] = [tops and list(map(_plain, tops)) for tops in table["top_logprobs"]]
    return table


def _plain(value: Any) -> Any:
    # Mode "json" would turn a NaN or an infinity into null.
    return value.model_dump(mode="python", warnings=False) if isinstance(value, BaseModel) else value


def _dump(value: Any, where: str) -> bytes:
    try:
        return to_json(value, inf_nan_mode="constants", fallback=as_number)
    except (TypeError, ValueError):
        return _dump_escaped(value, where)


def _dump_escaped(value: Any, where: str) -> bytes:
    """A lone surrogate is no UTF-8, but JSON has an escape for it."""
    try:
        return json.dumps(value, default=as_json).encode()
    except (TypeError, ValueError) as error:
        place = _place(value)
        raise InvalidTrajectory(f"{where} holds a value that cannot be written down{place}: {error}") from error


def _place(fields: JSON) -> str:
    """Where in a trajectory's fields the value is that JSON cannot hold."""
    items = fields.get("messages_and_choices") or ()
    histories = fields.get("additional_histories") or ()
    for what, parts in (("item", items), ("additional history", histories), ("field", fields)):
        for name, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
            try:
                json.dumps(part, default=as_json)
            except (TypeError, ValueError):
                inner = _place(part) if what == "additional history" else ""
                return f", in {what} {name!r}{inner}"
    return ""


def _load(text: bytes) -> Any:
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)
