"""Conversations to train on from a file with one JSON object a line: `messages`, and `tools` where there are some.

Gives trajectories in a shuffled order without holding the file. Knows nothing of training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from art_core import Trajectory
from art_core.errors import InvalidTrajectory

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def iterate_file(
    path: str | Path, epochs: int = 1, shuffle_buffer_size: int = 10000, seed: int = 42, initial_skip: int = 0
) -> Iterator[Trajectory]:
    """The file's conversations, `epochs` times, each time in another order, without the first `initial_skip`.

    At most `shuffle_buffer_size` are held, and one is drawn from them at random; 1 or less keeps the file's order. The
    order depends only on `seed` and epoch. Empty lines are passed over, and so are keys other than the two. Raises
    ValueError for a file that isn't named .jsonl or holds nothing, InvalidTrajectory, naming file and line, for a line
    that is no conversation or has no reply to train on.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} is not named .jsonl; it must hold one JSON object a line, as JSON Lines files do.")
    if epochs < 0 or initial_skip < 0:
        raise ValueError(f"epochs is {epochs} and initial_skip {initial_skip}; neither can be below 0.")
    rows = (row for epoch in range(epochs) for row in _shuffled(_lines(path), shuffle_buffer_size, seed + epoch))
    return islice(rows, initial_skip, None)


def count_conversations(path: str | Path) -> int:
    """How many conversations the file holds, each of which was read. Raises as `iterate_file`."""
    return sum(1 for _ in iterate_file(path, shuffle_buffer_size=1))


def _shuffled(rows: Iterator[Trajectory], size: int, seed: int) -> Iterator[Trajectory]:
    if size <= 1:
        yield from rows
        return
    order = random.Random(seed)
    held: list[Trajectory] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        drawn = order.randrange(size)
        yield held[drawn]
        held[drawn] = row
    order.shuffle(held)
    yield from held


def _lines(path: Path) -> Iterator[Trajectory]:
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            empty = False
            yield _trajectory(line, f"{path}, line {number}")
    if empty:
        raise ValueError(f"{path} holds no conversation.")


def _trajectory(line: bytes, where: str) -> Trajectory:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise InvalidTrajectory(f"{where}: this is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise InvalidTrajectory(f"{where}: this is a {type(row).__name__}, not an object with `messages`.")
    messages, tools = row.get("messages"), row.get("tools")
    if not isinstance(messages, list):
        raise InvalidTrajectory(f"{where}: `messages` must be a list of messages; it is {_kind(messages)}.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidTrajectory(f"{where}: messages[{index}] must be an object; it is {_kind(message)}.")
        if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise InvalidTrajectory(
                f"{where}: messages[{index}].role is {message.get('role')!r}; it must be one of {known}."
            )
    if all(message["role"] != "assistant" for message in messages):
        raise InvalidTrajectory(f"{where}: no message is the assistant's, so there is nothing to train on.")
    if messages[0]["role"] == "assistant":
        raise InvalidTrajectory(f"{where}: messages[0] is a reply to nothing. Put the message before it.")
    if not (tools is None or isinstance(tools, list)):
        raise InvalidTrajectory(f"{where}: `tools` must be a list of tools; it is {_kind(tools)}.")
    try:
        return Trajectory(messages_and_choices=messages, tools=tools or None)
    except ValidationError as error:
        raise InvalidTrajectory(f"{where}: {error}") from error


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
