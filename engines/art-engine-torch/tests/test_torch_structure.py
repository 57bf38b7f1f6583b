"""Answers of a shape that was asked for, and tokens drawn from changed logits, whose logprobs stay the policy's own."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from art_conformance.serving import event_lines
from art_conformance.tiny_model import write_base_model
from art_engine_torch.server.logit_changes import LogitSettings, changed_row
from art_engine_torch.server.sampling import SamplingSettings, sample

MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "weather", "schema": PARAMETERS, "strict": True}}
BASE = "tiny"


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": MESSAGES, "max_tokens": 200, **changes}


async def answered(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


@pytest.fixture(scope="module")
def server(serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model with a scripted tool call, whose template marks where tools were given."""
    with serving(write_base_model(tmp_path_factory.mktemp("tiny"))) as running:
        yield running


def fits(value: Any) -> None:
    assert set(value) == {"city", "days"}
    assert isinstance(value["city"], str)
    assert len(value["city"]) <= 8
    assert 1 <= value["days"] <= 9


async def test_an_answer_of_a_schema_parses_in_a_hundred_of_a_hundred_tries(http: httpx.AsyncClient) -> None:
    choices = await answered(http, **chat(n=100, response_format=SCHEMA, logprobs=True))
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 100
    for choice in choices:
        fits(json.loads(choice["message"]["content"]))
        assert choice["allowed_logprob"] <= 0.0
    assert len({choice["message"]["content"] for choice in choices}) > 50


async def test_an_answer_that_is_an_object_parses_in_a_hundred_of_a_hundred_tries(http: httpx.AsyncClient) -> None:
    # A random model closes nothing by itself: what a text needs to come to its end is made likely.
    likely = {str(token): 30.0 for token in await closing(http)}
    choices = await answered(http, **chat(n=100, response_format={"type": "json_object"}, logit_bias=likely))
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 100
    for choice in choices:
        assert isinstance(json.loads(choice["message"]["content"]), dict)


async def closing(http: httpx.AsyncClient) -> list[int]:
    """The ids of a closing brace and of a quotation mark."""
    found = []
    for text in ("}", '"'):
        response = await http.post(
            "/v1/completions",
            json={"model": BASE, "prompt": text, "max_tokens": 1, "return_token_ids": True},
        )
        [token] = response.json()["choices"][0]["prompt_token_ids"]
        found.append(token)
    return found


@pytest.mark.slow
async def test_a_required_call_is_made_in_a_hundred_of_a_hundred_tries(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "Say yes."}]
    choices = await answered(
        http, **chat(messages=messages, n=100, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    )
    for choice in choices:
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "look_up":
            fits(arguments)
        else:
            assert (call["function"]["name"], arguments) == ("stop", {})
    several = await answered(http, **chat(n=20, tools=TOOLS, tool_choice="required"))
    assert all(choice["message"]["tool_calls"] for choice in several)


async def test_the_function_that_was_chosen_is_called_once_whole_and_streamed(http: httpx.AsyncClient) -> None:
    body = chat(n=10, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "stop"}})
    for choice in await answered(http, **body):
        [call] = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "stop", "arguments": "{}"}
    async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") async for line in event_lines(response)]
    chunks = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    names = [call["function"]["name"] for c in chunks for call in c["delta"].get("tool_calls") or ()]
    assert names == ["stop"] * 10
    assert {c["finish_reason"] for c in chunks} - {None} == {"tool_calls"}


async def test_one_call_is_the_last_where_calls_may_not_be_parallel(http: httpx.AsyncClient) -> None:
    # Unasked, this model makes the same call for ever once it has ended one: its end is taken away.
    body = chat(tools=TOOLS, ignore_eos=True, temperature=0, max_tokens=60, return_token_ids=True)
    [free] = await answered(http, **body)
    [held] = await answered(http, **body, parallel_tool_calls=False)
    assert free["finish_reason"] == "length"
    assert held["finish_reason"] == "tool_calls"
    assert len(held["message"]["tool_calls"]) == 1
    assert held["token_ids"] == free["token_ids"][: len(held["token_ids"])]
    assert len(held["token_ids"]) < 10


async def test_a_format_beside_tools_leaves_both(http: httpx.AsyncClient) -> None:
    choices = await answered(http, **chat(n=30, tools=TOOLS, response_format=SCHEMA))
    for choice in choices:
        calls = choice["message"].get("tool_calls")
        if calls:
            assert calls[0]["function"]["name"] in ("look_up", "stop")
        else:
            fits(json.loads(choice["message"]["content"]))


async def test_rows_with_a_structure_and_rows_without_share_a_batch(http: httpx.AsyncClient) -> None:
    plain = chat(seed=3, max_tokens=30, return_token_ids=True, ignore_eos=True)
    alone = await answered(http, **plain)
    together = await asyncio.gather(
        answered(http, **plain), *(answered(http, **chat(response_format=SCHEMA)) for _ in range(8))
    )
    assert together[0][0]["token_ids"] == alone[0]["token_ids"]
    for [choice] in together[1:]:
        fits(json.loads(choice["message"]["content"]))


async def test_logprobs_are_those_of_the_policy_before_the_structure(http: httpx.AsyncClient, server: Any) -> None:
    from art_conformance.oracle import oracle_for

    asked = chat(response_format=SCHEMA, logprobs=True, return_token_ids=True)
    response = (await http.post("/v1/chat/completions", json=asked)).json()
    [choice] = response["choices"]
    true = oracle_for(server.folder).logprobs(response["prompt_token_ids"], choice["token_ids"], None)
    found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert found == pytest.approx(list(true), abs=1e-3)
    # What was drawn was as likely as this, and the rest of it is what the mask took away.
    assert sum(found) < choice["allowed_logprob"] < 0.0
    stats = (await http.get("/stats")).json()
    assert stats["structured_tokens"] > 0
    assert stats["allowed_logprob"] < 0.0
    [free] = await answered(http, **chat(max_tokens=5))
    assert "allowed_logprob" not in free


async def test_a_bias_of_a_hundred_is_what_is_said_and_one_of_minus_a_hundred_is_not(http: httpx.AsyncClient) -> None:
    [choice] = await answered(http, **chat(logit_bias={"70": 100}, max_tokens=10, return_token_ids=True))
    assert choice["token_ids"] == [70] * 10
    free = (await answered(http, **chat(temperature=0, max_tokens=10, return_token_ids=True, ignore_eos=True)))[0]
    banned = {str(token): -100 for token in set(free["token_ids"])}
    [other] = await answered(
        http, **chat(temperature=0, max_tokens=10, return_token_ids=True, ignore_eos=True, logit_bias=banned)
    )
    assert not set(other["token_ids"]) & set(free["token_ids"])


def row_of(size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2)) * 3


def test_penalties_are_openais_and_the_repetition_penalty_ctrls() -> None:
    row, prompt, answer = row_of(), np.array([1, 2, 2], np.int32), [3, 3, 4]
    changed = changed_row(row, LogitSettings({7: 2.5}, 0.5, 0.25), None, prompt, answer)
    expected = row.clone()
    expected[3] -= 0.5 + 2 * 0.25
    expected[4] -= 0.5 + 0.25
    expected[7] += 2.5
    torch.testing.assert_close(changed.logits, expected)
    assert changed.allowed_logprob == 0.0
    repeated = changed_row(row, LogitSettings(repetition=1.5), None, prompt, answer).logits
    for token in range(len(row)):
        value = float(row[token])
        if token in (1, 2, 3, 4):
            value = value / 1.5 if value > 0 else value * 1.5
        assert float(repeated[token]) == pytest.approx(value)


DRAWS = 20_000


@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.8}, {"temperature": 0.7, "min_p": 0.05}])
def test_a_changed_row_is_drawn_from_and_its_logprob_is_the_rows_own(filters: dict[str, float]) -> None:
    row, changed = row_of(), row_of().roll(5)
    changed[10:20] = -math.inf
    logits = row.expand(DRAWS, -1).contiguous()
    settings = [SamplingSettings(seed=i, **filters) for i in range(DRAWS)]  # type: ignore[arg-type]
    drawn = sample(logits, settings, [0] * DRAWS, dict.fromkeys(range(DRAWS), changed))
    found = np.bincount(drawn.tokens, minlength=len(row)) / DRAWS
    p = torch.softmax(changed.double() / filters.get("temperature", 1.0), -1)
    p[p < filters.get("min_p", 0.0) * p.max()] = 0.0
    if "top_k" in filters:
        p[p < p.sort(descending=True).values[int(filters["top_k"]) - 1]] = 0.0
    if "top_p" in filters:
        order = p.argsort(descending=True)
        p[order[int((p[order].cumsum(0) < filters["top_p"]).sum()) + 1 :]] = 0.0
    expected = (p / p.sum()).numpy()
    spread = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) <= 5 * spread + 1e-9).all()
    own = torch.log_softmax(row.double(), -1)
    assert drawn.logprobs == pytest.approx([float(own[token]) for token in drawn.tokens], abs=1e-5)


@pytest.mark.slow
def test_min_p_looks_as_far_as_it_must() -> None:
    flat = torch.zeros(3000)
    flat[2000:] = -10.0
    drawn = sample(
        flat.expand(2000, -1).contiguous(), [SamplingSettings(seed=i, min_p=0.5) for i in range(2000)], [0] * 2000
    )
    assert max(drawn.tokens) < 2000
    assert len(set(drawn.tokens)) > 1000


@pytest.mark.slow
async def test_penalties_reach_the_draw(http: httpx.AsyncClient) -> None:
    free = chat(temperature=0, max_tokens=60, return_token_ids=True, ignore_eos=True)
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 5.0}):
        [plain], [held] = await answered(http, **free), await answered(http, **free, **penalty)
        assert len(set(held["token_ids"])) > len(set(plain["token_ids"])), penalty
    [choice] = await answered(http, **chat(min_p=1.0, max_tokens=10, seed=1, return_token_ids=True, ignore_eos=True))
    [greedy] = await answered(http, **chat(temperature=0, max_tokens=10, return_token_ids=True, ignore_eos=True))
    assert choice["token_ids"] == greedy["token_ids"]
