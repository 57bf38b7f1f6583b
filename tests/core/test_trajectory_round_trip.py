"""What is written down of trajectories comes back as it was: every field, every number, every extra of a choice."""

from __future__ import annotations

import copy
import math
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.chat_completion import Choice
from pydantic import ValidationError

from art_core import History, RolloutError, Trajectory, TrajectoryGroup
from art_engine_kit.groups_file import read_groups, write_groups

FLOATS = st.floats(width=64)
SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | FLOATS | st.text()
NUMBERS = st.booleans() | st.integers(-(2**53), 2**53) | FLOATS
TEXT = st.text(max_size=20)


def choice_of(
    content: str | None, token_ids: list[int], logprobs: list[float], version: int, finish_reason: str
) -> Choice:
    return Choice.construct(
        index=0,
        finish_reason=finish_reason,
        message={"role": "assistant", "content": content},
        logprobs={"content": [{"token": f"t{i}", "logprob": lp, "top_logprobs": []} for i, lp in enumerate(logprobs)]},
        token_ids=token_ids,
        prompt_token_ids=[1, 2, 3],
        policy_version=version,
        engine_scores=[*logprobs, float("nan")],
    )


CHOICES = st.builds(
    choice_of,
    st.none() | TEXT,
    st.lists(st.integers(0, 200_000), max_size=5),
    st.lists(st.floats(max_value=0), max_size=5),
    st.integers(0, 99),
    st.sampled_from(["stop", "length", "tool_calls", "abort"]),
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT},
    optional={"name": TEXT, "tool_calls": st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=2)},
)
ITEMS = st.lists(MESSAGES | CHOICES, max_size=4)
TOOLS = st.none() | st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": st.just({"name": "f"})}))
HISTORIES = st.builds(History, messages_and_choices=ITEMS, tools=TOOLS)
TRAJECTORIES = st.builds(
    Trajectory,
    messages_and_choices=ITEMS,
    tools=TOOLS,
    additional_histories=st.lists(HISTORIES, max_size=2),
    reward=FLOATS,
    initial_policy_version=st.none() | st.integers(0, 99),
    final_policy_version=st.none() | st.integers(0, 99),
    metrics=st.dictionaries(TEXT, NUMBERS, max_size=3),
    metadata=st.dictionaries(TEXT, SCALARS, max_size=3),
    logs=st.lists(TEXT, max_size=2),
    start_time=st.datetimes(timezones=st.just(UTC)),
)
ERRORS = st.builds(RolloutError, type=TEXT, message=TEXT, traceback=TEXT)


def group_of(trajectories: list[Trajectory], errors: list[RolloutError], fields: dict[str, Any]) -> TrajectoryGroup:
    return TrajectoryGroup(trajectories, exceptions=errors, **fields)


GROUPS = st.builds(
    group_of,
    st.lists(TRAJECTORIES, max_size=2),
    st.lists(ERRORS, max_size=2),
    st.fixed_dictionaries(
        {
            "metadata": st.dictionaries(TEXT, SCALARS, max_size=2),
            "metrics": st.dictionaries(TEXT, NUMBERS, max_size=2),
            "logs": st.lists(TEXT, max_size=2),
        }
    ),
)


def plain(value: Any) -> Any:
    """A form that compares by content and exact type, so that True is not 1 and NaN is NaN."""
    if isinstance(value, Choice):
        return ("Choice", plain(value.model_dump(warnings=False)))
    if isinstance(value, History | TrajectoryGroup | RolloutError):
        return (type(value).__name__, {name: plain(getattr(value, name)) for name in type(value).model_fields})
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return (type(value).__name__, value.isoformat() if isinstance(value, datetime) else repr(value))


@pytest.mark.slow
@settings(max_examples=60)
@given(groups=st.lists(GROUPS, max_size=2))
def test_a_job_file_gives_back_every_group(groups: list[TrajectoryGroup], tmp_path_factory: Any) -> None:
    file: Path = tmp_path_factory.getbasetemp() / "groups.json"
    write_groups(file, groups)
    assert plain(read_groups(file)) == plain(groups)


@settings(max_examples=60)
@given(group=GROUPS)
def test_for_logging_can_be_read_back(group: TrajectoryGroup) -> None:
    assert plain(TrajectoryGroup.model_validate(group.for_logging())) == plain(group)
    for trajectory in group:
        assert plain(Trajectory.model_validate(trajectory.for_logging())) == plain(trajectory)
        assert plain(Trajectory.model_validate_json(trajectory.model_dump_json())) == plain(trajectory)


@settings(max_examples=30)
@given(group=GROUPS)
def test_copies_hold_the_same_and_share_nothing_when_deep(group: TrajectoryGroup) -> None:
    for other in (copy.copy(group), copy.deepcopy(group), pickle.loads(pickle.dumps(group)), group.model_copy()):
        assert plain(other) == plain(group)
    deep = copy.deepcopy(group)
    deep.log("only here")
    assert len(group.logs) == len(deep.logs) - 1


def test_a_choice_that_was_read_back_is_a_choice_with_its_tokens() -> None:
    trajectory = Trajectory(
        messages_and_choices=[{"role": "user", "content": "hi"}, choice_of("yes", [5, 6], [-0.5, -math.inf], 4, "stop")]
    )
    back = Trajectory.model_validate(trajectory.for_logging())
    choice: Any = back.messages_and_choices[1]
    assert isinstance(choice, Choice)
    assert (choice.token_ids, choice.prompt_token_ids, choice.policy_version) == ([5, 6], [1, 2, 3], 4)
    assert [entry.logprob for entry in choice.logprobs.content] == [-0.5, -math.inf]
    assert choice.message.content == "yes"
    assert back.policy_versions() == {4}


def test_a_finish_reason_of_an_engine_s_own_survives() -> None:
    trajectory = Trajectory(messages_and_choices=[choice_of("cut", [1], [-1.0], 0, "abort")])
    back: Any = Trajectory.model_validate(trajectory.for_logging()).messages_and_choices[0]
    assert back.finish_reason == "abort"
    assert back.message.content == "cut"
    assert back.logprobs.content[0].logprob == -1.0


def test_tool_calls_reach_the_next_request() -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "price", "arguments": '{"item": "tea"}'}}
    choice = Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {"role": "assistant", "content": None, "tool_calls": [call]},
        }
    )
    trajectory = Trajectory(messages_and_choices=[{"role": "user", "content": "how much?"}, choice])
    assert trajectory.messages() == [
        {"role": "user", "content": "how much?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    back = Trajectory.model_validate(trajectory.for_logging())
    assert back.messages() == trajectory.messages()


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (3, "not int; append `chat_completion.choices[0]`"),
        ({"content": "hi"}, "a message needs a 'role'; got a dictionary with the keys ['content']"),
        ({"finish_reason": "stop", "message": "not a message"}, "message"),
    ],
)
def test_an_item_that_is_neither_message_nor_choice_is_refused(item: Any, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Trajectory(messages_and_choices=[item])
    assert said in str(caught.value)


def test_no_list_at_all_is_refused_as_such() -> None:
    with pytest.raises(ValidationError, match="a list of messages and choices"):
        Trajectory(messages_and_choices=None)  # type: ignore[arg-type]


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="rewards"):
        Trajectory(rewards=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="meta"):
        TrajectoryGroup([], meta={})  # type: ignore[call-overload]


def test_durations_add_up_and_finish_counts_from_the_start() -> None:
    trajectory = Trajectory(start_time=datetime(2020, 1, 1, tzinfo=UTC))
    with trajectory.track_duration("tool"):
        pass
    first = trajectory.metrics["tool_duration"]
    with pytest.raises(RuntimeError), trajectory.track_duration("tool"):
        raise RuntimeError
    assert trajectory.metrics["tool_duration"] >= first >= 0
    assert trajectory.finish() is trajectory
    assert trajectory.metrics["duration"] > 86400 * 365
