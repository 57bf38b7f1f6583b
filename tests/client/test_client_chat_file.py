"""Files of conversations: what is read, in which order, and which line is at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from art.chat_file import iterate_file
from art_core.errors import InvalidTrajectory

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"id": "call1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def talk(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}."}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def numbers(path: Path, **options: Any) -> list[int]:
    return [int(str(t.messages()[1].get("content")).rstrip(".")) for t in iterate_file(path, **options)]


@pytest.fixture
def twenty(tmp_path: Path) -> Path:
    return write(tmp_path / "talks.jsonl", *({"messages": talk(i)} for i in range(20)))


def test_messages_and_tools_come_as_they_were_written(tmp_path: Path) -> None:
    messages = [
        talk(1)[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call1", "content": "2 é"},
        {"role": "assistant", "content": "Two."},
    ]
    path = write(tmp_path / "talks.jsonl", {"messages": messages, "tools": TOOLS, "id": 7}, "", {"messages": talk(2)})
    first, second = iterate_file(path, shuffle_buffer_size=1)
    assert first.messages() == messages
    assert first.tools == TOOLS
    assert second.tools is None


def test_each_epoch_has_all_of_them_once_in_an_order_of_its_own_that_the_seed_decides(twenty: Path) -> None:
    read = numbers(twenty, epochs=2)
    assert sorted(read[:20]) == sorted(read[20:]) == list(range(20))
    assert read[:20] != read[20:]
    assert read[:20] != list(range(20))
    assert read == numbers(twenty, epochs=2)
    assert read != numbers(twenty, epochs=2, seed=1)


def test_a_small_buffer_still_gives_each_once_and_one_of_one_keeps_the_order(twenty: Path) -> None:
    assert sorted(numbers(twenty, shuffle_buffer_size=3)) == list(range(20))
    assert numbers(twenty, shuffle_buffer_size=3) != list(range(20))
    assert numbers(twenty, shuffle_buffer_size=1) == list(range(20))


def test_what_is_skipped_is_what_would_have_come_first(twenty: Path) -> None:
    assert numbers(twenty, epochs=2, initial_skip=25) == numbers(twenty, epochs=2)[25:]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"messages": [', "not JSON"),
        ([1], "a list, not an object"),
        ({"message": []}, "`messages` must be a list of messages; it is missing"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object; it is a str"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\]\.role is 'bot'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\]\.role is \['user'\]"),
        ({"messages": talk(1)[:1]}, "no message is the assistant's"),
        ({"messages": []}, "no message is the assistant's"),
        ({"messages": talk(1)[1:]}, "reply to nothing"),
        ({"messages": talk(1), "tools": "add"}, "`tools` must be a list of tools; it is a str"),
    ],
)
def test_a_line_that_cannot_be_trained_on_is_named(tmp_path: Path, row: Any, problem: str) -> None:
    path = write(tmp_path / "talks.jsonl", {"messages": talk(1)}, "", row)
    with pytest.raises(InvalidTrajectory, match=rf"talks\.jsonl, line 3: .*{problem}"):
        list(iterate_file(path))


def test_a_file_of_another_kind_or_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not named \.jsonl"):
        iterate_file(tmp_path / "talks.json")
    with pytest.raises(ValueError, match="holds no conversation"):
        list(iterate_file(write(tmp_path / "none.jsonl")))
