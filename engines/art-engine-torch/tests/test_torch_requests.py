"""Requests that no answer can be given to: each is refused by its field, and none of them ends anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from art_conformance.serving import event_lines
from art_engine_torch.server.api_errors import ApiError
from art_engine_torch.server.api_requests import ChatRequest, CompletionRequest, parse

BASE = "tiny"
MESSAGES = [{"role": "user", "content": "Good morning."}]
ENDLESS = "".join(f"{{% for {name} in range(99999) %}}" for name in "ijk") + "{% endfor %}" * 3


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": MESSAGES, "max_tokens": 4, **changes}


async def refused(http: httpx.AsyncClient, path: str = "chat/completions", **body: Any) -> dict[str, Any]:
    response = await http.post(f"/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def answered(http: httpx.AsyncClient, path: str = "chat/completions", **body: Any) -> dict[str, Any]:
    response = await http.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_malformed_history_is_named_by_its_field(http: httpx.AsyncClient) -> None:
    said = {"role": "assistant", "content": None}
    for calls, param in (
        ("text", "messages.1.tool_calls"),
        ({"tool_calls": ["text"]}["tool_calls"], "messages.1.tool_calls.0"),
        ([{"function": "add"}], "messages.1.tool_calls.0.function"),
        ([{"function": ["add"]}], "messages.1.tool_calls.0.function"),
    ):
        error = await refused(http, **chat(messages=[*MESSAGES, {**said, "tool_calls": calls}]))
        assert error["param"] == param
        assert error["message"].startswith(param)


async def test_an_unknown_role_is_answered_with_the_roles(http: httpx.AsyncClient) -> None:
    error = await refused(http, **chat(messages=[{"role": "usr", "content": "x"}]))
    assert error["param"] == "messages.0.role"
    for role in ("system", "developer", "user", "assistant", "tool"):
        assert role in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chat_template": "{{ 1 // 0 }}"}, "ZeroDivisionError"),
        ({"chat_template": "{# nothing #}"}, "writes nothing"),
        ({"chat_template": "{{ messages[0].content[:0] }}", "add_generation_prompt": False}, "writes nothing"),
        ({"chat_template": ENDLESS}, "of computing"),
        ({"chat_template": "{{ 'x' * 99999999999 }}"}, "MemoryError"),
        ({"chat_template": "{{ ('x' * 99999999) }}"}, "maximum context length"),
        ({"chat_template": "{{ 7 ** (9 ** (9 ** 9)) }}"}, "of computing"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
    ],
)
async def test_no_template_ends_the_server_or_is_answered_from_nothing(
    http: httpx.AsyncClient, server: Any, changes: dict[str, Any], says: str
) -> None:
    assert says in (await refused(http, **chat(**changes)))["message"]
    await answered(http, **chat())
    assert not server.failures


@pytest.mark.slow
async def test_others_are_answered_while_a_template_never_ends(http: httpx.AsyncClient) -> None:
    endless = asyncio.create_task(refused(http, **chat(chat_template=ENDLESS)))
    await asyncio.sleep(0)
    for _ in range(20):
        await answered(http, **chat())
    assert not endless.done(), "the others waited for it"
    await endless


@pytest.mark.slow
async def test_a_template_of_a_request_needs_the_servers_trust(tiny_model: Callable[[str], Path], serving: Any) -> None:
    with serving(tiny_model("llama-tied"), trust_templates=False) as running:
        async with httpx.AsyncClient(base_url=running.url, headers=running.headers, timeout=60) as http:
            error = await refused(http, **chat(chat_template="{{ messages[0].content }}"))
            assert error["param"] == "chat_template"
            assert "--trust-request-chat-template" in error["message"]
            await answered(http, **chat())


@pytest.mark.slow
async def test_a_prompt_process_that_is_killed_is_started_anew(http: httpx.AsyncClient, server: Any) -> None:
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    writing = [p for p in alive if "art_engine_torch.server.prompt_process" in p.cmdline()]
    assert writing
    for process in writing:
        process.kill()
    await answered(http, **chat())
    assert not server.failures


async def test_a_conversation_that_outgrows_the_context_says_so_in_the_words_that_are_looked_for(
    http: httpx.AsyncClient,
) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    huge = [{"role": "user", "content": "x" * 5_000_000}]
    for body in (
        chat(messages=long),
        chat(max_tokens=5000),
        chat(messages=huge),
        chat(messages=long, stream=True),
        chat(max_completion_tokens=5000, stream=True),
    ):
        error = await refused(http, **body)
        assert "This model's maximum context length is 512 tokens" in error["message"]
        assert error["code"] == "context_length_exceeded"
    for prompt in ("x" * 600, [1] * 600, "x" * 5_000_000):
        error = await refused(http, "completions", model=BASE, prompt=prompt, max_tokens=1)
        assert "This model's maximum context length is 512 tokens" in error["message"]


async def test_an_image_too_large_to_be_read_is_still_told_what_could_serve_it(http: httpx.AsyncClient) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5_000_000}}
    error = await refused(http, **chat(messages=[{"role": "user", "content": [image]}]))
    assert error["param"] == "messages.0.content.0"
    assert "vLLM" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1e30},
        {"seed": 10**40},
        {"temperature": 1e-320},
        {"temperature": 1e-9, "top_p": 1e-300, "top_k": 1},
        {"logit_bias": {"0": 100, "319": -100}},
        {"stop": ["\N{GRINNING FACE}", "é"]},
        {"min_p": 1, "presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1e-9},
    ],
)
async def test_extreme_values_are_answered_or_refused(
    http: httpx.AsyncClient, server: Any, fields: dict[str, Any]
) -> None:
    response = await http.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code in (200, 400), response.text
    await answered(http, **chat())
    assert not server.failures


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": True}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": ["a"] * 40}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"320": 1}}, "logit_bias.320"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}},
            "response_format.json_schema.schema",
        ),
        ({"tools": ["add"], "tool_choice": "auto"}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "f"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice.function.name",
        ),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_efort": "low"}, "reasoning_efort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"stream_options": 5}, "stream_options"),
    ],
)
async def test_a_field_that_cannot_be_is_named(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert (await refused(http, **chat(**fields)))["param"] == param


async def test_what_todays_clients_send_is_answered(http: httpx.AsyncClient) -> None:
    plain = await answered(http, **chat(seed=5, return_token_ids=True))
    bookkeeping = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "verbosity": "low", "reasoning_effort": "minimal",
        "parallel_tool_calls": False, "prediction": {"type": "content", "content": "x"}, "modalities": ["text"],
        "stream_options": None, "functions": None, "response_format": {"type": "text"}, "best_of": 1,
    }  # fmt: skip
    changed = await answered(http, **chat(seed=5, return_token_ids=True, **bookkeeping))
    assert changed["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]


async def test_the_bytes_of_tokens_are_their_own_everywhere(http: httpx.AsyncClient) -> None:
    body = chat(n=4, max_tokens=60, seed=3, logprobs=True, top_logprobs=3, return_token_ids=True, ignore_eos=True)
    whole = await answered(http, **body)
    parts = 0
    for choice in whole["choices"]:
        entries = choice["logprobs"]["content"]
        special = [entry["bytes"] for entry in entries if entry["token"].startswith("<|")]
        assert all(bytes(said).startswith(b"<|") for said in special)
        text = b"".join(bytes(entry["bytes"]) for entry in entries if not entry["token"].startswith("<|"))
        assert text.decode("utf-8", "replace") == choice["message"]["content"]
        for entry in entries:
            for each in (entry, *entry["top_logprobs"]):
                if each["token"] == "\ufffd":
                    parts += 1
                    [byte] = each["bytes"]
                    assert byte >= 0x80
    assert parts > 20, "no token was a part of a character"
    async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") async for line in event_lines(response)]
    streamed: dict[int, list[Any]] = {}
    for line in lines[:-1]:
        for choice in json.loads(line)["choices"]:
            streamed.setdefault(choice["index"], []).extend((choice["logprobs"] or {}).get("content", ()))
    for choice in whole["choices"]:
        said = [entry["bytes"] for entry in choice["logprobs"]["content"]]
        assert [entry["bytes"] for entry in streamed[choice["index"]]] == said


@pytest.mark.slow
async def test_a_step_that_fails_ends_the_requests_in_it_and_nothing_else(
    tiny_model: Callable[[str], Path], serving: Any
) -> None:
    with serving(tiny_model("llama-tied")) as running:
        scheduler = running.engine.scheduler
        forward, broken = scheduler._forward, [True]

        def fails_once(*arguments: Any) -> Any:
            if broken.pop() if broken else False:
                raise IndexError("a row that is not there")
            return forward(*arguments)

        scheduler._forward = fails_once
        async with httpx.AsyncClient(base_url=running.url, headers=running.headers, timeout=60) as http:
            response = await http.post("/v1/chat/completions", json=chat())
            assert response.status_code == 500
            assert "a row that is not there" in response.text
            await answered(http, **chat())
        assert not running.failures
        scheduler._forward = lambda *_: 1 / 0
        async with httpx.AsyncClient(base_url=running.url, headers=running.headers, timeout=60) as http:
            for _ in range(3):
                await http.post("/v1/chat/completions", json=chat())
        assert running.failures, "a server that can do no step says that it can"


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["auto", "required", "json_schema", "function", "text", "{{ messages }}", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "json_schema", "schema", "1", "parameters"])
            | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.data())
def test_every_field_of_a_request_is_read_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([ChatRequest, CompletionRequest]))
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(kind.model_fields)), ANYTHING, max_size=4))
    body = {"model": BASE, "messages": MESSAGES, "prompt": "x"}
    del body["prompt" if kind is ChatRequest else "messages"]
    try:
        parse(kind, {**body, **fields})
    except ApiError as error:
        told = error.status == 400 and bool(error.message)
        assert told, repr(error)  # noqa: PT017


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_ends_the_server(server: Any, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([ChatRequest, CompletionRequest]))
    names = sorted(set(kind.model_fields) - {"model", "stream"})
    fields = data.draw(st.dictionaries(st.sampled_from(names), ANYTHING, max_size=3))
    if kind is ChatRequest:
        path, body = "chat/completions", chat(**fields)
    else:
        path, body = "completions", {"model": BASE, "prompt": "x", "max_tokens": 4, **fields}
    for limit in ("max_tokens", "max_completion_tokens", "n"):
        if isinstance(body.get(limit), int | float) and body[limit] > 8:
            body[limit] = 8
    response = httpx.post(f"{server.url}/v1/{path}", json=body, headers=server.headers, timeout=60)
    assert response.status_code in (200, 400), response.text
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    assert not server.failures
