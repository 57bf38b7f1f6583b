"""The endpoint between an agent and a model: what it passes on, what it keeps, and whom it answers."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

import art
from art.environments.recorder import SESSION_HEADER, CompletionRecorder

MESSAGES: Any = [{"role": "user", "content": "?"}]


def agent_of(recorder: CompletionRecorder, model: art.Model, session: str = "s") -> openai.AsyncOpenAI:
    """The client that an agent of a session would hold."""
    return openai.AsyncOpenAI(
        base_url=recorder.base_url(model.openai_client()),
        api_key="the agent's own",
        default_headers={**recorder.headers, SESSION_HEADER: session},
        max_retries=0,
    )


async def test_an_answer_is_kept_as_it_was_sampled_and_passed_on_as_the_agent_asked(
    endpoint: Any, model: art.Model
) -> None:
    async with CompletionRecorder() as recorder, agent_of(recorder, model) as agent:
        recorder.open("s")
        completion = await agent.chat.completions.create(
            model="agent", messages=MESSAGES, max_tokens=7, extra_body={"top_k": 3}
        )
        (kept,) = recorder.close("s")
    (request,) = endpoint.requests
    assert (request["max_tokens"], request["top_k"], request["authorization"]) == (7, 3, "Bearer sk-endpoint")
    assert kept.messages == MESSAGES
    assert kept.choice.token_ids == [1000 + ord(c) for c in "reply to 1"]
    assert len(kept.choice.logprobs.content) == len(kept.choice.token_ids)
    assert kept.choice.policy_version == 3
    passed_on = completion.choices[0].model_dump(exclude_unset=True)
    assert passed_on["message"]["content"] == "reply to 1"
    assert not {"token_ids", "prompt_token_ids", "logprobs", "policy_version"} & passed_on.keys()


async def test_who_asks_for_logprobs_gets_them(model: art.Model) -> None:
    async with CompletionRecorder() as recorder, agent_of(recorder, model) as agent:
        completion = await agent.chat.completions.create(model="agent", messages=MESSAGES, logprobs=True)
    assert completion.choices[0].logprobs is not None


async def test_a_stream_says_the_same_and_is_kept_whole(endpoint: Any, model: art.Model, make_said: Any) -> None:
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": f'{{"n": {n}}}'}} for n in range(2)
    ]
    endpoint.say = lambda body: make_said("both", tool_calls=calls)
    async with CompletionRecorder() as recorder, agent_of(recorder, model) as agent:
        recorder.open("s")
        async with agent.chat.completions.stream(
            model="agent", messages=MESSAGES, stream_options={"include_usage": True}
        ) as stream:
            whole = await stream.get_final_completion()
        (kept,) = recorder.close("s")
    assert "stream" not in endpoint.requests[0]
    message = whole.choices[0].message
    assert message.content == "both"
    assert [call.function.arguments for call in message.tool_calls] == ['{"n": 0}', '{"n": 1}']
    assert whole.usage is not None
    assert kept.choice.token_ids == [1000 + ord(c) for c in "both"]


async def test_sessions_are_kept_apart_and_only_while_they_are_open(model: art.Model) -> None:
    async with CompletionRecorder() as recorder:
        recorder.open("one")
        recorder.open("two")
        for session in ("one", "two", "two", "nobody's"):
            async with agent_of(recorder, model, session) as agent:
                await agent.chat.completions.create(model="agent", messages=MESSAGES)
        assert [len(recorder.close(session)) for session in ("one", "two", "nobody's", "one")] == [1, 2, 0, 0]


async def test_a_refusal_reaches_the_agent_as_it_came_and_nothing_is_kept(endpoint: Any, model: art.Model) -> None:
    endpoint.refuses = 400
    async with CompletionRecorder() as recorder, agent_of(recorder, model) as agent:
        recorder.open("s")
        with pytest.raises(openai.BadRequestError, match="the prompt is too long"):
            await agent.chat.completions.create(model="agent", messages=MESSAGES)
        assert recorder.close("s") == []


@pytest.mark.slow
async def test_an_endpoint_that_is_gone_is_said(model: art.Model) -> None:
    model.inference_base_url = "http://127.0.0.1:9/v1"
    async with CompletionRecorder() as recorder, agent_of(recorder, model) as agent:
        with pytest.raises(openai.InternalServerError, match=r"Connection error|timed out") as refused:
            await agent.chat.completions.create(model="agent", messages=MESSAGES)
    assert refused.value.status_code in (503, 504)


async def test_an_agent_that_goes_away_leaves_no_request_behind(endpoint: Any, model: art.Model) -> None:
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.sleep(60)

    endpoint.before = wait
    async with CompletionRecorder() as recorder, agent_of(recorder, model) as agent:
        recorder.open("s")
        asking = asyncio.create_task(agent.chat.completions.create(model="agent", messages=MESSAGES))
        async with asyncio.timeout(10):
            await begun.wait()
            asking.cancel()
            while not endpoint.gone:
                await asyncio.sleep(0.01)
        assert recorder.close("s") == []


async def test_only_the_environment_that_opened_it_is_answered(endpoint: Any, model: art.Model) -> None:
    async with CompletionRecorder() as recorder:
        stranger = openai.AsyncOpenAI(
            base_url=recorder.base_url(model.openai_client()), api_key="guessed", max_retries=0
        )
        async with stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.chat.completions.create(model="agent", messages=MESSAGES)
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
    assert endpoint.requests == []
    assert recorder.headers["X-ART-Recorder-Key"] not in repr(recorder)


async def test_models_are_listed_and_other_interfaces_refused_in_words(model: art.Model) -> None:
    async with CompletionRecorder() as recorder, agent_of(recorder, model) as agent:
        assert [listed.id async for listed in agent.models.list()] == ["agent"]
        with pytest.raises(openai.NotFoundError, match="ART's models answer chat completions"):
            await agent.responses.create(model="agent", input="?")


async def test_what_is_no_chat_completion_is_refused(model: art.Model) -> None:
    async with CompletionRecorder() as recorder, agent_of(recorder, model) as agent:
        for body in ([], {"model": "agent"}):
            with pytest.raises(openai.BadRequestError, match="a JSON object with messages and a model"):
                await agent.post("/chat/completions", body=body, cast_to=object)
