"""Tables of trajectories are bounded, whatever a step holds; the files of an adapter are those that are served."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from art_core import Trajectory, TrajectoryGroup
from art_tracker_kit import COLUMNS, ROWS, TEXT, adapter_files, table_of


def trajectory(text, reward=0.0):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
    return Trajectory(messages_and_choices=messages, reward=reward, metrics={"turns": 1})


def test_a_row_says_what_happened():
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    with_call = Trajectory(
        messages_and_choices=[{"role": "assistant", "content": None, "tool_calls": [call]}], final_policy_version=3
    )
    table = table_of(
        [TrajectoryGroup([trajectory("hi", 0.5)], exceptions=[ValueError("no")]), TrajectoryGroup([with_call])]
    )
    first, raised, called = (dict(zip(COLUMNS, row, strict=True)) for row in table.rows)
    assert table.total == 3
    assert first["conversation"] == "user: hello\n\nassistant: hi"
    assert (first["group"], first["reward"], first["metrics"]) == (0, 0.5, '{"turns": 1}')
    assert (raised["group"], raised["reward"], raised["error"]) == (0, None, "ValueError: no")
    assert '"name": "look"' in called["conversation"]
    assert (called["group"], called["final_policy_version"]) == (1, 3)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(0, 6000), st.sampled_from("a\u00e9\ud800"))
def test_a_table_is_bounded_and_sees_every_part_of_the_step(sizes, length, letter):
    groups = [TrajectoryGroup([trajectory(letter * length)] * size) for size in sizes]
    table = table_of(groups)
    assert table.total == sum(sizes)
    assert len(table.rows) == min(ROWS, sum(sizes))
    assert all(len(cell) <= TEXT for row in table.rows for cell in row if isinstance(cell, str))
    for row in table.rows:
        "".join(cell for cell in row if isinstance(cell, str)).encode()
    if sizes and sum(sizes) <= ROWS * 2:
        assert {row[0] for row in table.rows} >= {n for n, size in enumerate(sizes) if size >= 2}


def test_the_files_of_an_adapter(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.state", "inner/more.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    names = [file.relative_to(tmp_path).as_posix() for file in adapter_files(tmp_path)]
    assert names == ["adapter_config.json", "adapter_model.safetensors", "inner/more.json"]
    with pytest.raises(FileNotFoundError, match="may be deleted before"):
        adapter_files(tmp_path / "gone")
