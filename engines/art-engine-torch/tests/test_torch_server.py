"""The HTTP surface, asked over real connections: a tiny random model behind the real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from art_conformance.serving import event_lines

KEY = "a-test-key"
BASE = "tiny"
CONTEXT = 512
MESSAGES = [{"role": "user", "content": "Good morning."}]
WAIT_S = 60.0


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": MESSAGES, "max_tokens": 8, "ignore_eos": True, **changes}


async def post(http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = await http.post(path, json=body)
    assert response.status_code == status, response.text
    parsed: dict[str, Any] = response.json()
    return parsed


async def chunks_of(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") async for line in event_lines(response)]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def load(http: httpx.AsyncClient, name: str, folder: Path, status: int = 200) -> str:
    response = await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
    assert response.status_code == status, response.text
    return response.text


async def test_chat_with_samples_logprobs_and_token_ids(http: httpx.AsyncClient, server: Any, reference: Any) -> None:
    answer = await post(
        http,
        "/v1/chat/completions",
        chat(n=3, seed=4, logprobs=True, top_logprobs=2, return_token_ids=True),
    )
    prompt = answer["prompt_token_ids"]
    assert answer["object"] == "chat.completion"
    assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 24, "total_tokens": len(prompt) + 24}
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "length"
        assert len(choice["token_ids"]) == 8
        expected = reference(server.folder, None, prompt + choice["token_ids"])[len(prompt) - 1 : -1]
        for row, token, entry in zip(expected, choice["token_ids"], choice["logprobs"]["content"], strict=True):
            assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
            assert entry["top_logprobs"][0]["logprob"] == pytest.approx(float(row.max()), abs=1e-3)
            assert len(entry["top_logprobs"]) == 2


async def test_the_same_seed_gives_the_same_answer_and_no_seed_another(http: httpx.AsyncClient) -> None:
    one, two, three, four = [
        (await post(http, "/v1/chat/completions", chat(return_token_ids=True, n=2, **extra)))["choices"]
        for extra in ({"seed": 1}, {"seed": 1}, {}, {})
    ]
    assert [c["token_ids"] for c in one] == [c["token_ids"] for c in two]
    assert one[0]["token_ids"] != one[1]["token_ids"]
    assert [c["token_ids"] for c in three] != [c["token_ids"] for c in four]


async def test_a_stream_carries_what_a_whole_answer_does(http: httpx.AsyncClient) -> None:
    asked = chat(n=2, seed=11, max_tokens=20, logprobs=True, return_token_ids=True)
    whole = await post(http, "/v1/chat/completions", asked)
    chunks = await chunks_of(http, "/v1/chat/completions", {**asked, "stream_options": {"include_usage": True}})
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        text = "".join(c["delta"].get("content") or "" for c in own)
        assert text == choice["message"]["content"]
        assert [t for c in own for t in c.get("token_ids", [])] == choice["token_ids"]
        logprobs = [e["logprob"] for c in own if c["logprobs"] for e in c["logprobs"]["content"]]
        expected = [e["logprob"] for e in choice["logprobs"]["content"]]
        assert logprobs == pytest.approx(expected, abs=1e-3)
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"]


async def test_completions_take_text_ids_and_batches(http: httpx.AsyncClient) -> None:
    asked = {
        "model": BASE,
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 1,
    }
    text = await post(http, "/v1/completions", {**asked, "prompt": "Good"})
    ids = text["choices"][0]["prompt_token_ids"]
    both = await post(http, "/v1/completions", {**asked, "prompt": [ids, [5, 6, 7]], "n": 2})
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in both["choices"]] == [ids, ids, [5, 6, 7], [5, 6, 7]]
    assert both["choices"][0]["token_ids"] == both["choices"][1]["token_ids"] == text["choices"][0]["token_ids"]
    logprobs = text["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 5
    assert logprobs["token_logprobs"][0] == pytest.approx(max(logprobs["top_logprobs"][0].values()))
    assert "".join(logprobs["tokens"]) == text["choices"][0]["text"]
    chunks = await chunks_of(http, "/v1/completions", {**asked, "prompt": ids})
    assert "".join(c["choices"][0]["text"] for c in chunks) == text["choices"][0]["text"]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == ids


async def test_stop_strings_and_stop_tokens(http: httpx.AsyncClient) -> None:
    asked = chat(seed=21, max_tokens=40, return_token_ids=True)
    free = (await post(http, "/v1/chat/completions", asked))["choices"][0]
    text = free["message"]["content"]
    stop = text[6:8]
    ended = (await post(http, "/v1/chat/completions", {**asked, "stop": [stop]}))["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert ended["stop_reason"] == stop
    assert ended["message"]["content"] == text[: text.index(stop)]
    assert ended["token_ids"] == free["token_ids"][: len(ended["token_ids"])]
    streamed = await chunks_of(http, "/v1/chat/completions", {**asked, "stop": stop})
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed) == text[: text.index(stop)]
    token = free["token_ids"][9]
    by_id = (await post(http, "/v1/chat/completions", {**asked, "stop_token_ids": [token]}))["choices"][0]
    assert by_id["stop_reason"] == token
    assert by_id["token_ids"] == free["token_ids"][: free["token_ids"].index(token) + 1]


async def test_the_end_token_ends_an_answer(http: httpx.AsyncClient) -> None:
    answer = await post(
        http, "/v1/chat/completions", chat(ignore_eos=False, n=16, seed=3, max_tokens=400, return_token_ids=True)
    )
    ended = [choice for choice in answer["choices"] if choice["finish_reason"] == "stop"]
    assert ended
    for choice in ended:
        assert choice["token_ids"][-1] == 256
        assert "<|end|>" not in choice["message"]["content"]
        assert choice["stop_reason"] is None


async def test_any_openai_client_works(server: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=WAIT_S) as client:
        models = await client.models.list()
        assert [model.id for model in models.data] == [BASE]
        answer = await client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "x"}],
            max_completion_tokens=6,
            n=2,
            logprobs=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        assert len(answer.choices) == 2
        assert len(answer.choices[0].model_extra["token_ids"]) == 6  # type: ignore[index]
        stream = await client.chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "x"}], max_tokens=6, stream=True
        )
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason is not None
        with pytest.raises(openai.NotFoundError, match=BASE):
            await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_tokens": 5000}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "context_length_exceeded"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n:"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"max_token": 5}, "Did you mean 'max_tokens'"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tool_choice": "often", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"top_logprobs": 2}, "logprobs=true"),
        ({"chat_template": "{{ raise_exception('not this way') }}"}, "not this way"),
    ],
)
async def test_bad_input_is_a_400_that_says_why(http: httpx.AsyncClient, changes: dict[str, Any], says: str) -> None:
    answer = await post(http, "/v1/chat/completions", chat(**changes), status=400)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert says in json.dumps(answer["error"], ensure_ascii=False)


async def test_bad_prompts_are_a_400(http: httpx.AsyncClient) -> None:
    for prompt in ([], [[]], "", [99999], [-1]):
        await post(http, "/v1/completions", {"model": BASE, "prompt": prompt}, status=400)
    assert (await http.post("/v1/completions", content=b"{nonsense")).status_code == 400
    assert (await http.post("/v1/completions", content=b"[1]")).status_code == 400


async def test_too_long_a_context_says_the_lengths(http: httpx.AsyncClient) -> None:
    answer = await post(http, "/v1/completions", {"model": BASE, "prompt": [1] * 500, "max_tokens": 100}, status=400)
    for number in ("512", "500", "100", "600", "12"):
        assert number in answer["error"]["message"]


async def test_an_unknown_model_is_a_404_that_lists_what_there_is(
    http: httpx.AsyncClient, tiny_adapters: list[Path]
) -> None:
    await load(http, "p/m@1", tiny_adapters[0])
    answer = await post(http, "/v1/chat/completions", chat(model="p/m@2"), status=404)
    assert answer["error"]["code"] == "model_not_found"
    assert "tiny, p/m@1" in answer["error"]["message"]


async def test_a_missing_or_wrong_key_is_a_401(server: Any) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        assert (await client.get("/health")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert KEY not in response.text


async def test_each_adapter_answers_under_its_own_name(
    http: httpx.AsyncClient, server: Any, tiny_adapters: list[Path], reference: Any
) -> None:
    for i, folder in enumerate(tiny_adapters):
        await load(http, f"p/m@{i}", folder)
    models = (await http.get("/v1/models")).json()["data"]
    assert [(m["id"], m["parent"]) for m in models][1:] == [(f"p/m@{i}", BASE) for i in range(3)]
    names = [BASE, "p/m@0", "p/m@1", "p/m@2"] * 2
    answers = await asyncio.gather(
        *(
            post(http, "/v1/chat/completions", chat(model=name, logprobs=True, return_token_ids=True, max_tokens=12))
            for name in names
        )
    )
    for name, answer in zip(names, answers, strict=True):
        assert answer["model"] == name
        folder = None if name == BASE else tiny_adapters[int(name[-1])]
        prompt, choice = answer["prompt_token_ids"], answer["choices"][0]
        expected = reference(server.folder, folder, prompt + choice["token_ids"])[len(prompt) - 1 : -1]
        found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        assert found == pytest.approx(
            [float(r[t]) for r, t in zip(expected, choice["token_ids"], strict=True)], abs=1e-3
        )


async def test_unloading_lets_requests_end_and_refuses_new_ones(
    http: httpx.AsyncClient, server: Any, tiny_adapters: list[Path], reference: Any
) -> None:
    await load(http, "p/m@1", tiny_adapters[0])
    body = chat(model="p/m@1", max_tokens=300, logprobs=True, return_token_ids=True, stream=True)
    received: list[dict[str, Any]] = []
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = event_lines(response)
        async for line in lines:
            if line.startswith("data: {"):
                received.append(json.loads(line[6:]))
            if len(received) == 3:
                break
        assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": "p/m@1"})).status_code == 200
        await post(http, "/v1/chat/completions", chat(model="p/m@1"), status=404)
        received += [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
    prompt = received[0]["prompt_token_ids"]
    tokens = [t for chunk in received for t in chunk["choices"][0].get("token_ids", [])]
    logprobs = [
        e["logprob"]
        for chunk in received
        if chunk["choices"][0]["logprobs"]
        for e in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert len(tokens) == 300
    expected = reference(server.folder, tiny_adapters[0], prompt + tokens)[len(prompt) - 1 : -1]
    assert logprobs == pytest.approx([float(r[t]) for r, t in zip(expected, tokens, strict=True)], abs=1e-3)
    assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": "p/m@1"})).status_code == 404


async def test_adapters_are_refused_with_a_reason(
    http: httpx.AsyncClient, tiny_adapters: list[Path], tmp_path: Path
) -> None:
    assert "no adapter folder" in await load(http, "a", tmp_path / "nowhere", 404)
    assert "base model's own name" in await load(http, BASE, tiny_adapters[0], 400)
    await load(http, "a", tiny_adapters[0])
    assert "already loaded" in await load(http, "a", tiny_adapters[1], 400)
    await load(http, "b", tiny_adapters[0])
    await load(http, "c", tiny_adapters[0])
    assert "--max-adapters" in await load(http, "d", tiny_adapters[0], 400)
    body = {"lora_name": "e", "lora_path": str(tiny_adapters[0]), "load_inplace": True}
    await post(http, "/v1/load_lora_adapter", body, status=400)
    await post(http, "/v1/load_lora_adapter", {"lora_name": 3}, status=400)


async def test_tools_reach_the_template_and_tool_messages_go_on(http: httpx.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "two"}]},
    ]
    body = chat(messages=messages, tools=tools, return_token_ids=True, chat_template_kwargs={"suffix": "!"})
    answer = await post(http, "/v1/chat/completions", body)
    plain = await post(http, "/v1/completions", {"model": BASE, "prompt": answer["prompt_token_ids"], "max_tokens": 1})
    assert plain["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])
    longer = len(answer["prompt_token_ids"])
    without = await post(http, "/v1/chat/completions", chat(messages=messages, return_token_ids=True))
    assert longer - len(without["prompt_token_ids"]) > len("<tool></tool>!")


async def test_pausing_holds_and_resuming_goes_on(http: httpx.AsyncClient) -> None:
    assert (await http.post("/pause")).status_code == 200
    assert (await http.get("/is_paused")).json() == {"is_paused": True}
    request = asyncio.create_task(post(http, "/v1/chat/completions", chat()))
    done, _ = await asyncio.wait({request}, timeout=0.3)
    assert not done
    assert (await http.post("/resume")).status_code == 200
    assert (await request)["choices"][0]["finish_reason"] == "length"


async def test_pausing_with_abort_ends_what_runs(http: httpx.AsyncClient) -> None:
    request = asyncio.create_task(post(http, "/v1/chat/completions", chat(max_tokens=400)))
    while (await http.get("/stats")).json()["running"] == 0:
        await asyncio.sleep(0.01)
    assert (await http.post("/pause?mode=abort")).status_code == 200
    assert (await request)["choices"][0]["finish_reason"] == "abort"
    assert (await http.post("/resume")).status_code == 200


async def test_sleeping_keeps_requests_and_adapters(http: httpx.AsyncClient, tiny_adapters: list[Path]) -> None:
    await load(http, "p/m@1", tiny_adapters[0])
    request = asyncio.create_task(post(http, "/v1/chat/completions", chat(model="p/m@1", max_tokens=200)))
    while (await http.get("/stats")).json()["running"] == 0:
        await asyncio.sleep(0.01)
    assert (await http.post("/sleep")).status_code == 200
    await http.post("/resume")
    assert (await http.get("/is_paused")).json() == {"is_paused": True}  # a sleeping server must be woken
    assert (await http.post("/wake_up")).status_code == 200
    assert (await request)["usage"]["completion_tokens"] == 200
    assert (await post(http, "/v1/chat/completions", chat(model="p/m@1")))["model"] == "p/m@1"


async def test_a_client_that_goes_away_takes_its_sequences_along(server: Any, http: httpx.AsyncClient) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for stream in (False, True):
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=WAIT_S) as leaving:
            request = asyncio.create_task(
                leaving.post("/v1/chat/completions", json=chat(n=4, max_tokens=450, stream=stream))
            )
            while (await http.get("/stats")).json()["running"] != 4:
                await asyncio.sleep(0.005)
            request.cancel()
        deadline = time.monotonic() + WAIT_S
        while (await http.get("/stats")).json()["running"] and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert (await http.get("/stats")).json()["running"] == 0
    assert server.engine.ready
    await post(http, "/v1/chat/completions", chat())


async def test_many_requests_at_once_all_get_their_own_answer(http: httpx.AsyncClient) -> None:
    prompts = [[i, i + 1, i + 2] * (1 + i % 5) for i in range(60)]
    answers = await asyncio.gather(
        *(
            post(
                http, "/v1/completions", {"model": BASE, "prompt": p, "max_tokens": 6, "return_token_ids": True, "n": 2}
            )
            for p in prompts
        )
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [prompt, prompt]


@pytest.mark.slow
async def test_an_engine_that_fails_says_so_and_is_not_healthy(tiny_model: Callable[[str], Path], serving: Any) -> None:
    with serving(tiny_model("llama-tied")) as running:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=WAIT_S) as client:
            running.engine.scheduler.decoder.forward = None  # type: ignore[assignment,method-assign]
            answer = await post(client, "/v1/chat/completions", chat(), status=500)
            assert "the engine failed" in answer["error"]["message"]
            assert (await client.get("/health")).status_code == 503
            assert (await client.post("/v1/chat/completions", json=chat())).status_code == 503
        assert running.failures


@pytest.mark.slow
async def test_a_server_that_stops_ends_its_requests(tiny_model: Callable[[str], Path], serving: Any) -> None:
    with serving(tiny_model("llama-tied")) as running:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=WAIT_S) as client:
            request = asyncio.create_task(client.post("/v1/chat/completions", json=chat(n=8, max_tokens=480)))
            while (await client.get("/stats")).json()["running"] == 0:
                await asyncio.sleep(0.005)
            running.engine.request_stop()
            response = await request
            assert response.status_code == 500
            assert "stopping" in response.text
