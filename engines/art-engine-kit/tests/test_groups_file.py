"""The file of trajectory groups: all comes back, training's reader agrees with it, and damage is told in words.

That every group of random trajectories comes back as it was is in tests/core/test_trajectory_round_trip.py.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types.chat import ChatCompletionMessageToolCall
from openai.types.chat.chat_completion import Choice
from pydantic import BaseModel

from art_core import History, Trajectory, TrajectoryGroup
from art_core.errors import InvalidTrajectory
from art_engine_kit.group_records import NO_LOGPROBS, GroupRecord, HistoryRecord, record_of
from art_engine_kit.groups_file import FORMAT, GroupsFileError, read_groups, read_records, write_groups

LONE = b"caf\xe9".decode("utf-8", "surrogateescape")


def entry(logprob: Any = -0.1, **fields: Any) -> dict[str, Any]:
    return {"token": "t", "bytes": [116], "logprob": logprob, "top_logprobs": [], **fields}


def choice(prompt: list[int] | None, ids: Any, entries: Any = None, **extra: Any) -> Choice:
    """A choice as the openai package makes it; by default with a logprob of -0.1 for each token."""
    known = [entry() for _ in ids or ()] if entries is None else entries
    ids_of = {"token_ids": ids, "prompt_token_ids": prompt}
    return Choice.construct(
        index=0,
        finish_reason="stop",
        message={"role": "assistant", "content": "said"},
        logprobs={"content": known},
        **{name: value for name, value in ids_of.items() if value is not None},
        **extra,
    )


def group_of(*items: Any, **fields: Any) -> TrajectoryGroup:
    """One trajectory with these items, and one that says nothing."""
    own = Trajectory(messages_and_choices=[{"role": "user", "content": "?"}, *items], reward=0.5, **fields)
    return TrajectoryGroup([own, Trajectory(reward=-1.0)])


def written(file: Path, *groups: TrajectoryGroup) -> Path:
    write_groups(file, groups)
    return file


def plain(value: Any) -> Any:
    """A form that compares by content and exact type, so that True is not 1 and NaN is NaN."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="python", warnings=False))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return (type(value).__name__, value.isoformat() if isinstance(value, datetime) else repr(value))


def there_and_back(file: Path, group: TrajectoryGroup) -> Any:
    """The first trajectory's items, once they were written and read."""
    (back,) = read_groups(written(file, group))
    assert plain(back) == plain(group)
    return back[0].messages_and_choices[1:]


def as_values(record: GroupRecord) -> Any:
    def history(known: HistoryRecord) -> Any:
        rows = [(row.token_ids.tolist(), repr(row.logprobs.tolist()), row.spans) for row in known.rows]
        return rows, known.unread, known.altered, plain(known.read())

    return record.exceptions, [(t.reward, [history(known) for known in t.histories]) for t in record.trajectories]


ITEMS: dict[str, list[Any]] = {
    "plain": [choice([1, 2], [3, 4])],
    "logprobs to the last bit": [choice([1], [2, 3], [entry(-0.1 - 2**-55), entry(-1e-300)])],
    "logprobs that are none": [choice([1], [2, 3, 4], [entry(math.nan), entry(-math.inf), entry(math.inf)])],
    "a logprob that is missing": [choice([1], [2, 3], [entry(None), entry()])],
    "a whole number as logprob": [choice([1], [2], [entry(-1)])],
    "fields of an engine's own in an entry": [choice([1], [2, 3], [entry(rank=3, score=math.nan), entry()])],
    "other tokens": [choice([1], [2], [entry(top_logprobs=[{"token": "u", "bytes": None, "logprob": -math.inf}])])],
    "fewer logprobs than tokens": [choice([1], [2, 3], [entry()])],
    "logprobs of a refusal": [Choice.construct(**choice([1], [2]).to_dict() | {"logprobs": {"refusal": [entry()]}})],
    "extra fields": [choice([1], [2], scores=[math.nan, 1.0], nested={"a": [None, True, 10**30]}, policy_version=3)],
    "what altered the drawing": [
        choice([1], [2], altered_sampling=["top_p", LONE]),
        choice([1], [2], altered_sampling=3),
    ],
    "no logprobs": [choice([1], [2], [])],
    "no token ids": [choice(None, None, [entry()]), choice([1], None), choice(None, [2])],
    "what is no token id": [choice([1], ["x"]), choice([1], [2.5]), choice([1], [2**40]), choice([1], [None])],
    "nothing sampled": [choice([1], [])],
    "an empty prompt": [choice([], [1])],
    "negative ids": [choice([-1], [-(2**31)])],
    "text that is not UTF-8": [
        {"role": "tool", "content": LONE},
        choice([1], [2], [entry(token=LONE)], note=LONE),
        choice([1], [LONE]),
    ],
    "a message with objects of the openai package": [
        {
            "role": "assistant",
            "tool_calls": [
                ChatCompletionMessageToolCall(id="1", type="function", function={"name": "f", "arguments": "{}"})  # type: ignore[arg-type]
            ],
        }
    ],
}


@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
def test_what_users_and_engines_put_in_comes_back(tmp_path: Path, items: list[Any]) -> None:
    back = there_and_back(tmp_path / "step.groups", group_of(*items))
    assert [type(item) for item in back] == [type(item) for item in items]


@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
def test_training_reads_of_the_file_what_it_reads_of_the_groups(tmp_path: Path, items: list[Any]) -> None:
    group = group_of(*items, additional_histories=[History(messages_and_choices=items)])
    (record,) = read_records(written(tmp_path / "step.groups", group))
    assert as_values(record) == as_values(record_of(group))


def test_text_that_is_not_utf8_comes_back_everywhere(tmp_path: Path) -> None:
    group = group_of(metadata={LONE: LONE}, logs=[LONE])
    group.log(LONE)
    group.exceptions.append(TrajectoryGroup([ValueError(LONE)]).exceptions[0])
    there_and_back(tmp_path / "step.groups", group)


def test_a_number_of_numpy_is_a_number(tmp_path: Path) -> None:
    group = group_of()
    group[0].reward = np.float32(0.25)  # type: ignore[assignment]
    group[0].metrics = {"turns": np.int64(3)}  # type: ignore[dict-item]
    (back,) = read_groups(written(tmp_path / "step.groups", group))
    assert (back[0].reward, back[0].metrics) == (0.25, {"turns": 3})
    (record,) = read_records(tmp_path / "step.groups")
    assert record.trajectories[0].reward == 0.25


def test_what_cannot_be_written_is_named_by_its_place(tmp_path: Path) -> None:
    bad = group_of({"role": "tool", "content": object()})
    with pytest.raises(InvalidTrajectory, match=r"^trajectory_groups\[1\]\.trajectories\[0\] holds a value"):
        write_groups(tmp_path / "step.groups", [group_of(), bad])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("group", "place"),
    [
        (group_of({"role": "tool", "content": object()}), "in item 1: "),
        (group_of(choice([1], [2]), choice([1], [2], judge=object())), "in item 2: "),
        (
            group_of(additional_histories=[History(), History(messages_and_choices=[{"role": "tool", "a": b"\xff"}])]),
            "in additional history 1, in item 0: ",
        ),
        (group_of(tools=[{"type": "function", "function": object()}]), "in field 'tools': "),
    ],
)
def test_it_is_named_by_message_too(tmp_path: Path, group: TrajectoryGroup, place: str) -> None:
    with pytest.raises(InvalidTrajectory) as error:
        write_groups(tmp_path / "step.groups", [group])
    assert f"trajectory_groups[0].trajectories[0] holds a value that cannot be written down, {place}" in str(
        error.value
    )


def test_rows_continue_while_prompts_do_and_no_token_is_in_two() -> None:
    first, second, other = choice([1, 2], [3, 4]), choice([1, 2, 3, 4, 5], [6]), choice([1, 9], [7])
    group = group_of(first, {"role": "user", "content": "more"}, second, other)
    (history,) = record_of(group).trajectories[0].histories
    long, short = history.rows
    assert long.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert [(span.item, span.start, span.length) for span in long.spans] == [(1, 2, 2), (3, 5, 1)]
    assert (short.token_ids.tolist(), short.spans) == ([1, 9, 7], [(4, 2, 1, 1)])


def test_what_cannot_be_read_as_tokens_says_why(tmp_path: Path) -> None:
    group = group_of(choice([1], None), choice(None, [1]), choice([1], ["x"]), choice([1], [2], []), choice([1], []))
    (history,) = record_of(group).trajectories[0].histories
    assert [(c.item, c.missing, bool(c.fault)) for c in history.unread] == [
        (1, "token_ids", False),
        (2, "prompt_token_ids", False),
        (3, "", True),
    ]
    assert [span.logprobs for row in history.rows for span in row.spans] == [NO_LOGPROBS]


def test_a_group_without_trajectories_and_a_step_without_groups(tmp_path: Path) -> None:
    file = tmp_path / "step.groups"
    assert read_groups(written(file)) == []
    assert list(read_records(file)) == []
    (record,) = read_records(written(file, TrajectoryGroup([RuntimeError("a"), RuntimeError("b")])))
    assert (record.trajectories, record.exceptions) == ([], 2)


@pytest.mark.slow
def test_writing_and_reading_hold_a_group_at_a_time(tmp_path: Path) -> None:
    def groups(count: int) -> Iterator[TrajectoryGroup]:
        for n in range(count):
            yield group_of(*(choice([n, i], list(range(2000))) for i in range(5)))

    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()
        work()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    file = tmp_path / "step.groups"
    peak(lambda: write_groups(file, groups(2)))
    few, many = (peak(lambda n=n: write_groups(file, groups(n))) for n in (2, 20))  # type: ignore[misc]
    assert many < 1.5 * few
    assert peak(lambda: [None for _ in read_records(file)]) < 0.5 * few


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def groups() -> Iterator[TrajectoryGroup]:
        yield group_of(choice([1], [2]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_groups(tmp_path / "step.groups", groups())
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    file = written(tmp_path / "step.groups", group_of(choice([1], [2])), group_of(choice([1], [3])))
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(GroupsFileError, match=r"step\.groups"):
            list(read_records(file))
    file.write_bytes(whole + b"\n")
    with pytest.raises(GroupsFileError, match=r"step\.groups is damaged"):
        list(read_records(file))


def test_a_changed_bit_is_noticed(tmp_path: Path) -> None:
    file = written(tmp_path / "step.groups", group_of(choice([1], [2])))
    whole = file.read_bytes()
    for at in range(whole.index(b"\n") + 1, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(GroupsFileError, match=r"step\.groups is damaged"):
            read_groups(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a file of trajectory groups"),
        (b"[]", "is not a file of trajectory groups"),
        (b"\xff" * 2000, "is not a file of trajectory groups"),
        (b'{"format": "parquet", "version": 1, "compression": "zlib"}\n', "is not a file of trajectory groups"),
        (json.dumps({"format": FORMAT, "version": 3, "compression": "zlib"}).encode() + b"\n", "in version 3 "),
        (json.dumps({"format": FORMAT, "version": 2, "compression": "zstd"}).encode() + b"\n", "compressed with zstd"),
    ],
)
def test_a_foreign_or_newer_file_is_refused_in_words(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "other.groups"
    file.write_bytes(content)
    for read in (read_groups, lambda path: list(read_records(path))):
        with pytest.raises(GroupsFileError, match=said) as error:
            read(file)
        assert str(file) in str(error.value)
