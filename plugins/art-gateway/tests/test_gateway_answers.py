"""One request and its answer: the one form, names, addresses, keys, and what passes through untouched.

The upstream is a server written for these tests, so that it can misbehave on demand; real engines answer behind the
gateway in the conformance suite.
"""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, Response

from art_gateway import RouteUnavailable

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


async def test_every_choice_says_what_was_sampled_and_by_which_step(stage: Any) -> None:
    status, body, headers = await stage.chat(n=2)
    assert status == 200
    assert body["model"] == "agent@3"
    assert headers["x-art-step"] == "3"
    assert len(body["choices"]) == 2
    for choice in body["choices"]:
        assert choice["token_ids"] == [1, 2]
        assert choice["prompt_token_ids"] == [11, 12, 13]
        assert choice["policy_version"] == 3
        assert [token["logprob"] for token in choice["logprobs"]["content"]] == [-0.5, -0.5]
        assert choice["message"]["content"] == "p/agent@3"


@pytest.mark.parametrize(
    ("fields", "altered"),
    [
        ({"temperature": 0.7, "top_p": 0.9, "seed": 3}, ["temperature", "top_p"]),
        ({"temperature": 0}, ["temperature"]),
        ({"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}, ["min_p", "repetition_penalty", "top_k"]),
        ({"tools": [TOOL], "tool_choice": "required"}, ["tool_choice"]),
        ({"response_format": {"type": "json_object"}, "logit_bias": {"5": 1}}, ["logit_bias", "response_format"]),
        (
            {
                "ignore_eos": True,
                "temperature": 1.0,
                "top_p": 1,
                "top_k": -1,
                "min_p": 0.0,
                "logit_bias": {},
                "presence_penalty": None,
            },
            None,
        ),
        ({"tools": [TOOL], "tool_choice": "auto", "response_format": {"type": "text"}}, None),
    ],
)
async def test_a_choice_that_was_drawn_from_other_probabilities_than_its_logprobs_says_so(
    stage: Any, fields: dict[str, Any], altered: list[str] | None
) -> None:
    _, body, _ = await stage.chat(n=2, **fields)
    assert [choice.get("altered_sampling") for choice in body["choices"]] == [altered] * 2


async def test_the_engine_is_asked_for_ids_and_logprobs_and_gets_the_rest_as_it_came(stage: Any) -> None:
    sent = {
        "tools": [TOOL],
        "stop": ["\n"],
        "response_format": {"type": "json_object"},
        "seed": 7,
        "something_new": {"deep": [1, 2.5, None]},
        "logprobs": False,
    }
    status, body, _ = await stage.chat(**sent)
    got = stage.upstream.requests[-1]
    assert status == 200
    assert {name: got[name] for name in sent if name != "logprobs"} == {
        name: value for name, value in sent.items() if name != "logprobs"
    }
    assert got["return_token_ids"] is True
    assert got["logprobs"] is True
    assert body["choices"][0]["logprobs"]["content"]


async def test_a_models_arguments_for_its_template_are_in_chat_requests_and_a_requests_own_win(stage: Any) -> None:
    stage.routes.template_arguments = {"enable_thinking": False, "date": "today"}
    await stage.chat()
    assert stage.upstream.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False, "date": "today"}
    await stage.chat(chat_template_kwargs={"enable_thinking": True})
    assert stage.upstream.requests[-1]["chat_template_kwargs"] == {"enable_thinking": True, "date": "today"}
    async with stage.client.post(f"{stage.url}/p/v1/completions", json={"model": "agent", "prompt": [1]}) as answer:
        assert answer.status == 200
    assert "chat_template_kwargs" not in stage.upstream.requests[-1]


async def test_completions_have_an_address_of_their_own(stage: Any) -> None:
    async with stage.client.post(f"{stage.url}/p/v1/completions", json={"model": "agent", "prompt": [1, 2]}) as answer:
        body = await answer.json()
    assert body["choices"][0]["policy_version"] == 3
    assert stage.upstream.requests[-1]["prompt"] == [1, 2]


async def test_a_step_is_asked_for_by_its_own_name(stage: Any) -> None:
    stage.routes.publish("p", "agent", 4)
    assert (await stage.chat("agent"))[1]["model"] == "agent@4"
    assert (await stage.chat("agent@3"))[1]["model"] == "agent@3"


async def test_an_unknown_name_is_told_what_there_is(stage: Any) -> None:
    stage.routes.publish("p", "other", 0)
    for asked in ("agnt", "agent@9"):
        status, body, _ = await stage.chat(asked)
        assert status == 404
        assert body["error"]["code"] == "model_not_found"
        assert "agent@3" in body["error"]["message"]
        assert "other@0" in body["error"]["message"]
    assert "Did you mean 'agent'?" in (await stage.chat("agnt"))[1]["error"]["message"]


async def test_without_a_project_a_name_must_be_of_one_only(stage: Any) -> None:
    assert (await stage.chat(project=None))[1]["model"] == "agent@3"
    stage.routes.publish("q", "agent", 0)
    status, body, _ = await stage.chat(project=None)
    assert status == 409
    assert "/p/v1, /q/v1" in body["error"]["message"]
    assert (await stage.chat("nobody", project=None))[0] == 404
    assert (await stage.chat(project="q"))[1]["model"] == "agent@0"


@pytest.mark.parametrize("model", [None, "", 7, ["agent"], "agent@", "agent@x", "agent@-1", "agent@3@4"])
async def test_an_odd_model_name_is_refused(stage: Any, model: Any) -> None:
    status, body, _ = await stage.chat(model)
    assert status == 400
    assert body["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]}, "messages.0.tool_calls.0.function"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"tools": {"a": 1}}, "tools"),
    ],
)
async def test_what_an_engine_would_stumble_over_is_named_and_never_reaches_it(
    stage: Any, fields: dict[str, Any], param: str
) -> None:
    status, body, _ = await stage.chat(**fields)
    assert status == 400
    assert body["error"]["param"] == param
    assert body["error"]["message"].startswith(param)
    assert not stage.upstream.requests
    assert (await stage.chat())[0] == 200


async def test_a_request_nested_too_deeply_to_be_written_is_a_400(stage: Any) -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    status, body, _ = await stage.chat(something=deep)
    assert status == 400
    assert body["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"agent"'])
async def test_a_body_that_is_no_object_is_refused(stage: Any, content: bytes) -> None:
    async with stage.client.post(f"{stage.url}/p/v1/chat/completions", data=content) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "invalid_json"


async def test_a_body_too_large_is_refused_announced_or_not(stage: Any) -> None:
    large = json.dumps({"model": "agent", "pad": "x" * 2**20}).encode()

    async def pieces() -> Any:
        yield large

    for data in (io.BytesIO(large), pieces()):
        async with stage.client.post(f"{stage.url}/p/v1/chat/completions", data=data) as answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic the-users-key", "the-users-key"])
async def test_nothing_is_answered_without_the_key(stage: Any, header: str | None) -> None:
    headers = {"Authorization": header or ""}
    for method, path in (("POST", "/p/v1/chat/completions"), ("GET", "/p/v1/models"), ("GET", "/nowhere")):
        async with stage.client.request(method, f"{stage.url}{path}", headers=headers) as answer:
            assert answer.status == 401
            assert (await answer.json())["error"]["code"] == "invalid_api_key"
    async with stage.client.get(f"{stage.url}/health", headers=headers) as answer:
        assert answer.status == 200


async def test_models_are_listed_with_their_steps(stage: Any) -> None:
    stage.routes.publish("p", "agent", 4)
    stage.routes.publish("q", "other", 0)
    async with stage.client.get(f"{stage.url}/p/v1/models") as answer:
        listed = (await answer.json())["data"]
    assert [(card["id"], card["policy_version"]) for card in listed] == [("agent", 4), ("agent@3", 3), ("agent@4", 4)]
    async with stage.client.get(f"{stage.url}/v1/models") as answer:
        assert {card["owned_by"] for card in (await answer.json())["data"]} == {"p", "q"}
    async with stage.client.get(f"{stage.url}/p/v1/models/agent@3") as answer:
        assert (await answer.json())["root"] == "agent@3"
    async with stage.client.get(f"{stage.url}/p/v1/models/agent@9") as answer:
        assert answer.status == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/p/v1/embeddings", 404),
        ("GET", "/", 404),
        ("POST", "/p/v1/chat/completions/", 404),
        ("GET", "/p/v1/chat/completions", 405),
        ("POST", "/p/v1/models", 405),
    ],
)
async def test_other_addresses_are_errors_in_openais_form(stage: Any, method: str, path: str, status: int) -> None:
    async with stage.client.request(method, f"{stage.url}{path}") as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
async def test_the_engines_errors_pass_byte_for_byte(stage: Any, status: int) -> None:
    content = b'{ "error": {"message": "too  long: \xc3\xa9", "odd": [1,\n2]} }'
    stage.upstream.behave = lambda body: Response(
        content, status, media_type="application/json; x=y", headers={"Retry-After": "9"}
    )
    body = {"model": "agent", "messages": []}
    async with stage.client.post(f"{stage.url}/p/v1/chat/completions", json=body) as answer:
        assert answer.status == status
        assert await answer.read() == content
        assert answer.headers["content-type"] == "application/json; x=y"
        assert answer.headers["retry-after"] == "9"
    await stage.settled()


async def test_the_engine_refusing_our_key_is_not_blamed_on_the_user(stage: Any) -> None:
    stage.upstream.behave = lambda body: JSONResponse({"error": {"message": "no"}}, 401)
    status, body, _ = await stage.chat()
    assert (status, body["error"]["code"]) == (502, "engine_refused_gateway")


@pytest.mark.parametrize("content", [b"not json", b"{}", b'{"choices": [{"index": 0}]}'])
async def test_an_answer_without_token_ids_is_never_passed_on(stage: Any, content: bytes) -> None:
    stage.upstream.behave = lambda body: Response(content, 200, media_type="application/json")
    status, body, _ = await stage.chat()
    assert (status, body["error"]["code"]) == (502, "engine_answer_unusable")
    await stage.settled()


async def test_a_model_that_cannot_be_asked_now_says_why_and_when_to_come_back(stage: Any) -> None:
    stage.routes.down = RouteUnavailable("the engine restarts (it ran out of memory)", retry_after_s=2.5)
    status, body, headers = await stage.chat()
    assert status == 503
    assert "out of memory" in body["error"]["message"]
    assert headers["retry-after"] == "3"


async def test_a_request_waits_while_the_engine_restarts(stage: Any) -> None:
    stage.routes.wait = asyncio.Event()
    asking = asyncio.create_task(stage.chat())
    await asyncio.sleep(0.1)
    assert not asking.done()
    stage.routes.wait.set()
    assert (await asking)[0] == 200


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
async def test_no_body_whatever_is_answered_with_500(stage: Any, content: bytes) -> None:
    async with stage.client.post(f"{stage.url}/p/v1/chat/completions", data=content) as answer:
        assert answer.status in (400, 404)
        assert "message" in (await answer.json())["error"]


async def test_curl_needs_nothing_but_the_address_and_the_key(stage: Any) -> None:
    request = '{"model": "agent", "messages": [{"role": "user", "content": "hi"}]}'
    command = ["curl", "-sS", "--max-time", "20", f"{stage.url}/p/v1/chat/completions", "-d", request]
    done = await asyncio.to_thread(
        subprocess.run, [*command, "-H", "Authorization: Bearer the-users-key"], capture_output=True, timeout=30
    )
    assert json.loads(done.stdout)["choices"][0]["policy_version"] == 3, done.stderr
