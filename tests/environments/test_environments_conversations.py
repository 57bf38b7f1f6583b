"""What an agent asked, call by call, becomes the conversations that it led."""

from __future__ import annotations

from typing import Any

from openai.types.chat.chat_completion import Choice

from art.environments.conversations import Exchange, histories_of

USER = {"role": "user", "content": "?"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def answered(content: str | None = None, *calls: tuple[str, str]) -> Choice:
    made = [{"id": id, "type": "function", "function": {"name": "f", "arguments": said}} for id, said in calls]
    message = {"role": "assistant", "content": content, "tool_calls": made or None}
    return Choice.model_validate({"index": 0, "finish_reason": "stop", "message": message, "logprobs": None})


def asked(choice: Choice, *messages: dict[str, Any], tools: Any = None) -> Exchange:
    return Exchange(list(messages), tools, choice)


def said(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_calls_that_go_on_are_one_conversation_with_each_choice_as_it_came() -> None:
    one, two = answered("1"), answered("2")
    (history,) = histories_of([asked(one, USER), asked(two, USER, said("1"), USER)])
    assert history.messages_and_choices == [USER, one, USER, two]
    assert history.choices()[0] is one


def test_agents_in_parallel_have_conversations_of_their_own() -> None:
    other = {"role": "user", "content": "!"}
    a1, b1, a2, b2 = (answered(text) for text in ("a1", "b1", "a2", "b2"))
    first, second = histories_of(
        [
            asked(a1, USER),
            asked(b1, other),
            asked(b2, other, said("b1"), USER),
            asked(a2, USER, said("a1"), USER),
        ]
    )
    assert first.choices() == [a1, a2]
    assert second.choices() == [b1, b2]


def test_a_second_attempt_at_the_same_prompt_is_another_conversation() -> None:
    first, second = histories_of([asked(answered("1"), USER), asked(answered("2"), USER)])
    assert len(first.choices()) == len(second.choices()) == 1


def test_a_rewritten_past_begins_anew_and_what_was_written_counts_as_given() -> None:
    summed = [{"role": "user", "content": "so far: 1"}]
    one, two = answered("1"), answered("2")
    first, second = histories_of([asked(one, USER), asked(two, *summed)])
    assert first.choices() == [one]
    assert second.messages_and_choices == [*summed, two]


def test_a_past_that_only_looks_different_goes_on() -> None:
    one, two = answered(None, ("c1", '{"a":1}'), ("c2", "{}")), answered("2")
    call = {"role": "assistant", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{ }"}},
    ]}  # fmt: skip
    results = [{"role": "tool", "tool_call_id": f"c{n}", "content": "r"} for n in (1, 2)]
    parts = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    exchanges = [asked(one, USER, tools=TOOLS), asked(two, parts, call, *results, tools=TOOLS)]
    (history,) = histories_of(exchanges)
    assert history.messages_and_choices == [USER, one, *results, two]
    assert history.tools == TOOLS


def test_arguments_that_differ_are_another_conversation() -> None:
    one, two = answered(None, ("c1", '{"a":1}')), answered("2")
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":2}'}}
    changed = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert len(histories_of([asked(one, USER), asked(two, USER, changed, USER)])) == 2


def test_other_tools_are_another_conversation() -> None:
    one, two = answered("1"), answered("2")
    first, second = histories_of([asked(one, USER, tools=TOOLS), asked(two, USER, said("1"), USER)])
    assert first.tools == TOOLS
    assert second.tools is None


def test_of_several_the_longest_goes_on() -> None:
    a, b, c = answered("same"), answered("same"), answered("end")
    exchanges = [asked(a, USER), asked(b, USER, said("same"), USER), asked(c, USER, said("same"), USER, said("same"))]
    (history,) = histories_of(exchanges)
    assert history.choices() == [a, b, c]
