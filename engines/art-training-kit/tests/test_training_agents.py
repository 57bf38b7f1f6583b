"""Rollouts that are agents: turns cut off, empty answers, parallel tool calls, sub-agents, and templates that write the
past anew. Whatever the conversation, each sampled token is trained on once, after the very tokens it was sampled after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from art_core.trajectories import History, Trajectory, TrajectoryGroup
from art_engine_kit.group_records import record_of
from art_engine_kit.split_histories import SEVERAL_TURNS, SPLIT, often_split
from art_training_kit.packing import pack_rows
from art_training_kit.rows import TokenizedStep
from art_training_kit.tokenize import tokenize_groups

Make = Callable[..., Any]
Render = Callable[[list[dict[str, Any]]], str]


def plain(messages: list[dict[str, Any]]) -> str:
    """Writes every turn as it was said, and closes one that was cut off."""
    return "".join(f"{m['role'][0]}:{m['content']}{calls_of(m)}.\n" for m in messages) + "a:"


def without_thoughts(messages: list[dict[str, Any]]) -> str:
    """Strips the thinking of all earlier turns, as the templates of Qwen3 and its like do."""
    return re.sub(r"<[^>]*>", "", plain(messages))


def with_arguments_anew(messages: list[dict[str, Any]]) -> str:
    """Writes the arguments of tool calls in its own way."""
    return re.sub(r"\{[^{}]*\}", lambda found: json.dumps(json.loads(found[0]), sort_keys=True), plain(messages))


def calls_of(message: dict[str, Any]) -> str:
    return "".join(call["function"]["arguments"] for call in message.get("tool_calls", ()))


@dataclass
class Agent:
    """Holds conversations as an engine would answer them: prompts are rendered anew each time, one id a character."""

    make_choice: Make
    render: Render

    def turn(self, history: History, said: str, *, calls: list[str] = [], cut: bool = False) -> None:  # noqa: B006
        prompt = self.render(history.messages())
        choice = self.make_choice([ord(c) for c in prompt], [ord(c) for c in said + "".join(calls) + "." * (not cut)])
        choice.finish_reason = "length" if cut else "tool_calls" if calls else "stop"
        choice.message = choice.message.model_validate(
            {
                "role": "assistant",
                "content": said,
                "tool_calls": [
                    {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": arguments}}
                    for n, arguments in enumerate(calls)
                ]
                or None,
            }
        )
        history.messages_and_choices.append(choice)
        for n in range(len(calls)):
            history.messages_and_choices.append({"role": "tool", "tool_call_id": f"c{n}", "content": f"r{n}"})

    def hear(self, history: History, said: str) -> None:
        history.messages_and_choices.append({"role": "user", "content": said})


def opened(said: str) -> History:
    return History(messages_and_choices=[{"role": "user", "content": said}])


def tokenized(first: History, *others: History) -> TokenizedStep:
    trajectory = Trajectory(
        messages_and_choices=first.messages_and_choices, additional_histories=list(others), reward=1.0
    )
    group = TrajectoryGroup([trajectory, trajectory.model_copy(update={"reward": 0.0})])
    return tokenize_groups([record_of(group)], vocabulary_size=200, max_length=5000)


def trained_exactly(step: TokenizedStep, *histories: History) -> None:
    """Each token that a choice has is in one row's `trained`, after those it was sampled after, and no other is."""
    mine = [row for row in step.rows if row.trajectory == 0]
    sampled = [
        (choice.prompt_token_ids, choice.token_ids)
        for history in histories
        for choice in history.choices()
        if choice.token_ids
    ]
    found = []
    for row in mine:
        ids, trained = row.token_ids.tolist(), row.trained.tolist()
        while trained:
            start = trained[0]
            fitting = (
                (prompt, said)
                for prompt, said in sampled
                if prompt + said == ids[: start + len(said)]
                and trained[: len(said)] == list(range(start, start + len(said)))
            )
            prompt, said = max(fitting, key=lambda one: len(one[1]))
            found.append((prompt, said))
            trained = trained[len(said) :]
    assert sorted(found) == sorted(sampled)
    assert step.trained_tokens[:1].sum() == sum(len(said) for _, said in sampled)


def split_of(step: TokenizedStep) -> tuple[float, float]:
    """Of one trajectory: how many conversations had several turns, and how many of them are in pieces."""
    return step.metrics[SEVERAL_TURNS] / 2, step.metrics[SPLIT] / 2


@pytest.fixture
def agent(make_choice: Make) -> Callable[[Render], Agent]:
    return lambda render: Agent(make_choice, render)


def test_a_turn_cut_by_max_tokens_goes_on_in_the_same_row(agent: Callable[[Render], Agent]) -> None:
    history = opened("count")
    agent(plain).turn(history, "one, tw", cut=True)
    agent(plain).hear(history, "go on")
    agent(plain).turn(history, "three")
    step = tokenized(history)
    trained_exactly(step, history)
    row = step.rows[0]
    said = "".join(map(chr, row.token_ids[row.trained]))
    # The end that the template put to the cut turn was never sampled.
    assert said == "one, twthree."
    assert "one, tw.\n" in "".join(map(chr, row.token_ids))
    assert split_of(step) == (1, 0)


def test_an_empty_answer_is_trained_where_an_end_was_sampled_and_left_alone_where_nothing_was(
    agent: Callable[[Render], Agent],
) -> None:
    history = opened("say nothing")
    agent(plain).turn(history, "")
    agent(plain).hear(history, "and now?")
    agent(plain).turn(history, "", cut=True)
    agent(plain).hear(history, "and now?")
    agent(plain).turn(history, "Yes")
    step = tokenized(history)
    trained_exactly(step, history)
    assert [len(row) for row in step.rows if row.trajectory == 0] == [len(plain(history.messages()[:-1])) + len("Yes.")]
    row = step.rows[0]
    assert "".join(map(chr, row.token_ids[row.trained])) == ".Yes."
    only = opened("say nothing")
    agent(plain).turn(only, "", cut=True)
    nothing = tokenized(only)
    assert not nothing.rows
    assert nothing.metrics["data/step_num_trajectories_without_choice"] == 2


def test_parallel_tool_calls_are_one_turn_and_their_answers_are_context(agent: Callable[[Render], Agent]) -> None:
    history = opened("both prices")
    agent(plain).turn(history, "", calls=['{"a": 1}', '{"b": 2}'])
    agent(plain).turn(history, "3 in all")
    step = tokenized(history)
    trained_exactly(step, history)
    assert split_of(step) == (1, 0)
    assert len(step.rows) == 2


def test_arguments_that_the_template_writes_anew_split_the_conversation(agent: Callable[[Render], Agent]) -> None:
    history = opened("both prices")
    agent(with_arguments_anew).turn(history, "", calls=['{"b":2,"a":1}', '{"c": 3}'])
    agent(with_arguments_anew).turn(history, "3 in all")
    agent(with_arguments_anew).hear(history, "thanks")
    agent(with_arguments_anew).turn(history, "bye")
    step = tokenized(history)
    trained_exactly(step, history)
    assert split_of(step) == (1, 1)
    assert len(step.rows) == 4, "what was said after the call is one row"


def test_pieces_share_what_is_equal_when_they_are_packed(agent: Callable[[Render], Agent]) -> None:
    history = opened("a long question that every piece begins with")
    for n in range(3):
        agent(without_thoughts).turn(history, f"<thinks {n}>says {n}")
        agent(without_thoughts).hear(history, "more")
    step = tokenized(history)
    trained_exactly(step, history)
    assert split_of(step) == (1, 1)
    mine = [row for row in step.rows if row.trajectory == 0]
    assert len(mine) == 3
    (packed,) = pack_rows(mine, 5000)
    shared = sum(len(choice.token_ids) for choice in history.choices()) + len(without_thoughts(history.messages()[:5]))
    assert len(packed) <= shared, "each prompt's tokens are computed once"


def test_sub_agents_in_parallel_are_rows_of_one_trajectory(agent: Callable[[Render], Agent]) -> None:
    chief = opened("plan")
    agent(plain).turn(chief, "", calls=['{"do": 1}', '{"do": 2}'])
    agent(plain).turn(chief, "done")
    helpers = [opened("plan"), opened("plan")]
    for n, helper in enumerate(helpers):
        agent(plain).turn(helper, f"part {n}")
        agent(plain).hear(helper, "check")
        agent(plain).turn(helper, "checked")
    step = tokenized(chief, *helpers)
    trained_exactly(step, chief, *helpers)
    assert split_of(step) == (3, 0)
    assert [row.trajectory for row in step.rows] == [0, 0, 0, 1, 1, 1]


WORDS = st.text("ab<>", max_size=4).filter(lambda said: said.count("<") == said.count(">") == 0) | st.sampled_from(
    ["<t>a", "<t><u>", "b"]
)
CALLS = st.lists(st.sampled_from(['{"b":1,"a":2}', '{"a": 1, "b": 2}', "{}"]), max_size=2)
TURNS = st.lists(st.tuples(WORDS, CALLS, st.booleans()), min_size=1, max_size=5)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(TURNS, min_size=1, max_size=3),
    st.sampled_from([plain, without_thoughts, with_arguments_anew]),
)
def test_whatever_an_agent_does_each_sampled_token_is_trained_once(
    make_choice: Make, conversations: list[list[tuple[str, list[str], bool]]], render: Render
) -> None:
    agent, histories = Agent(make_choice, render), []
    for turns in conversations:
        histories.append(opened("?"))
        for said, calls, cut in turns:
            agent.turn(histories[-1], said, calls=calls, cut=cut)
            agent.hear(histories[-1], "more")
    step = tokenized(*histories)
    trained_exactly(step, *histories)
    several = pieces = 0
    for history in histories:
        sampled = [choice for choice in history.choices() if choice.token_ids]
        several += len(sampled) > 1
        pieces += any(
            after.prompt_token_ids[: len(before.prompt_token_ids + before.token_ids)]
            != before.prompt_token_ids + before.token_ids
            for before, after in pairwise(sampled)
        )
    assert split_of(step) == (several, pieces)


def test_it_is_told_only_where_many_conversations_are_in_pieces() -> None:
    assert not often_split({})
    assert not often_split({SEVERAL_TURNS: 0.0, SPLIT: 0.0})
    assert not often_split({SEVERAL_TURNS: 20.0, SPLIT: 2.0})
    said = often_split({SEVERAL_TURNS: 20.0, SPLIT: 3.0})
    assert said.startswith("3 of 20 conversations")
    assert "chat_template_kwargs" in said
