"""The dialect that engines start from: what it asks of a server with vLLM's additions, and how it reads the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from art_core import InferenceCapability, InferenceEngine, InferenceLaunch, LaunchPlan
from art_core.errors import EngineRefused, InvalidRequest, UnsupportedCapability
from art_engine_kit.openai_server import OpenAIServerEngine

Cap = InferenceCapability
CHAT: dict[str, Any] = {"model": "base", "messages": [], "logprobs": False}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look_up"}}


class Engine(OpenAIServerEngine):
    name = "mine"
    capabilities = frozenset({Cap.PAUSE, Cap.STREAMING_TOKEN_IDS})
    by_flavour = {"cuda": frozenset(Cap)}  # noqa: RUF012
    instead = {Cap.SLEEP: "Buy a GPU."}  # noqa: RUF012

    def launch(self, config: InferenceLaunch) -> LaunchPlan:
        return LaunchPlan(argv=(config.python, "serve"))


def test_a_name_and_a_launch_make_an_engine() -> None:
    assert isinstance(Engine(), InferenceEngine)
    with pytest.raises(TypeError, match="abstract"):
        OpenAIServerEngine()  # type: ignore[abstract]


def test_what_is_not_declared_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedCapability, match="Buy a GPU"):
        Engine().sleep()
    with pytest.raises(UnsupportedCapability, match="art plugins show"):
        Engine().prepare_request("chat/completions", {**CHAT, "tools": [TOOL]}, None)
    everything = Engine("cuda")
    assert everything.sleep().path.startswith("/sleep")
    assert everything.wake().action == "wake"
    assert everything.prepare_request("chat/completions", {**CHAT, "tools": [TOOL]}, None)["tools"] == [TOOL]


def test_an_engine_declares_the_same_in_a_flavour_of_which_nothing_is_said() -> None:
    assert Engine("cpu").capabilities == Engine().capabilities == {Cap.PAUSE, Cap.STREAMING_TOKEN_IDS}


def test_requests_name_the_adapter_and_ask_for_ids_and_logprobs() -> None:
    asked = Engine().prepare_request("chat/completions", CHAT, "p/m@3")
    assert asked == {"model": "p/m@3", "messages": [], "logprobs": True, "return_token_ids": True}
    assert CHAT["logprobs"] is False
    assert Engine().prepare_request("completions", {"model": "base", "prompt": [1]}, None)["logprobs"] == 0
    assert Engine().prepare_request("completions", {"model": "base", "logprobs": 4}, None)["logprobs"] == 4


def test_answers_come_into_the_one_form() -> None:
    choice = {"index": 0, "message": {"content": "x"}, "logprobs": {"content": []}, "token_ids": [7]}
    read = Engine().read_response("chat/completions", {"choices": [choice], "prompt_token_ids": [1, 2], "id": "a"})
    assert read == {"id": "a", "choices": [{**choice, "prompt_token_ids": [1, 2]}]}
    own = {**choice, "prompt_token_ids": [3]}
    assert Engine().read_response("completions", {"choices": [own]}) == {"choices": [own]}
    with pytest.raises(EngineRefused, match="choice 0 has no token_ids"):
        Engine().read_response("chat/completions", {"choices": [{**own, "token_ids": None}]})
    with pytest.raises(EngineRefused, match="choice 0 has no prompt_token_ids, logprobs"):
        Engine().read_response("chat/completions", {"choices": [{"index": 0, "token_ids": [7]}]})


def test_every_chunk_has_ids_and_the_first_the_prompts() -> None:
    first = Engine().read_chunk("chat/completions", {"choices": [{"index": 0, "delta": {}}], "prompt_token_ids": [1]})
    assert first == {"choices": [{"index": 0, "delta": {}, "token_ids": [], "prompt_token_ids": [1]}]}
    following = {"choices": [{"index": 0, "delta": {}, "token_ids": [4]}]}
    assert Engine().read_chunk("chat/completions", following) == following
    assert Engine().read_chunk("completions", {"choices": [], "usage": {}}) == {"choices": [], "usage": {}}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "rank 64"}}),
        (401, {"error": "rank 64"}),
        (404, {"object": "error", "message": "rank 64"}),
        (200, {"success": False, "error_message": "rank 64"}),
        (500, "rank 64"),
    ],
)
def test_a_refusal_carries_the_servers_sentence(status: int, body: Any) -> None:
    call = Engine().load_adapter("p/m@1", Path("/a"))
    text = body if isinstance(body, str) else json.dumps(body)
    with pytest.raises(EngineRefused, match=rf"mine refused to load adapter p/m@1: HTTP {status}: rank 64"):
        Engine().check_answer(call, status, text.encode())


@pytest.mark.parametrize("body", [b"", b"Success", b'{"success": true}', b"[]"])
def test_what_is_done_is_no_refusal(body: bytes) -> None:
    Engine().check_answer(Engine().pause(), 200, body)


def test_adapters_are_the_models_with_a_parent() -> None:
    body = json.dumps({"data": [{"id": "base", "parent": None}, {"id": "p/m@1", "parent": "base"}]}).encode()
    assert Engine().read_adapters(body) == {"p/m@1"}


def test_what_a_server_would_stumble_over_is_written_in_the_form_that_all_read() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": {"city": "Köln"}}}
    asked = Engine("cuda").prepare_request(
        "chat/completions",
        {
            "model": "base",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "max_completion_tokens": 5,
            "temperature": None,
            "verbosity": "low",
            "store": True,
        },
        "p/m@3",
    )
    asked_call = {**call, "function": {"name": "look_up", "arguments": '{"city": "Köln"}'}}
    assert asked == {
        "model": "p/m@3",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "", "tool_calls": [asked_call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "max_completion_tokens": 5,
        "logprobs": True,
        "return_token_ids": True,
    }


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": "text"}, "messages"),
        ("chat/completions", {"messages": [{"role": "usr", "content": "x"}]}, "messages.0.role"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages.0.content.0",
        ),
        ("chat/completions", {"messages": [], "tools": [{"type": "custom"}]}, "tools.0.type"),
        ("chat/completions", {"messages": [], "tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"messages": [], "tools": [TOOL], "tool_choice": "often"}, "tool_choice"),
        (
            "chat/completions",
            {"messages": [], "tools": [TOOL], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.type",
        ),
        (
            "chat/completions",
            {"messages": [], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        ("chat/completions", {"messages": [], "functions": [{"name": "f"}]}, "functions"),
        ("chat/completions", {"messages": [], "modalities": ["text", "audio"]}, "modalities"),
        ("completions", {"prompt": "x", "echo": True}, "echo"),
        ("completions", {"prompt": "x", "best_of": 3}, "best_of"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ],
)
def test_what_no_server_here_can_answer_is_named(endpoint: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        Engine("cuda").prepare_request(endpoint, {"model": "base", **fields}, None)
    assert refusal.value.param == param


def test_a_server_that_names_fields_itself_gets_the_request_as_it_came() -> None:
    class Names(Engine):
        names_fields = True

    sent = {"model": "base", "messages": "text", "verbosity": "low"}
    asked = Names("cuda").prepare_request("chat/completions", sent, None)
    assert {name: asked[name] for name in sent} == sent
