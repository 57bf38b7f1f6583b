"""What a running inference server must answer: samples, logprobs and token ids of the adapter that was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from art_core import InferenceCapability

from .answer_schema import assert_chat_completion, assert_chunks, assert_completion, assert_error, assert_models
from .live_engine_suite import ASK, IDENTITY, MEAN_LIMIT, ONE, OTHER_ASK, TWO, LiveEngineSuite
from .oracle import Oracle, agreement
from .requirements import MUST, SHOULD, check
from .serving import LiveEngine, gather_limited, merged, port_for_a_server, start_engine
from .tiny_model import TOOL_CALL

Cap = InferenceCapability
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "x",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
# Several scripts, one of them from right to left, combining and joined characters, and two ends of lines that JSON may
# hold as they are.
SCRIPTS: list[Any] = [
    {
        "role": "user",
        "content": "Grüße: 東京の天気は? Привет! مرحبا. नमस्ते. e\u0301 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈\u2028\u0085𝔸",
    }
]


class SamplingChecks(LiveEngineSuite):
    """The checks of `InferenceEngineConformance` on what is answered."""

    @check("INF-101", MUST, "The server answers its health path with 200 and lists the base model.", live=True)
    async def test_health_and_models(self, live: LiveEngine) -> None:
        plan = live.engine.launch(live.launch)
        assert (await live.client.get(plan.health_path)).status_code == 200
        models = (await live.client.get("/v1/models")).json()["data"]
        assert live.launch.served_name in {model["id"] for model in models}

    @check("INF-102", MUST, "A request without the API key, or with a wrong one, is refused with 401.", live=True)
    async def test_key_is_needed(self, live: LiveEngine, adapters: dict[str, Path]) -> None:
        body = live.engine.prepare_request("chat/completions", {"messages": ASK, "max_tokens": 1}, ONE)
        load = live.engine.load_adapter("conformance/intruder@1", adapters[ONE])
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
            assert (await live.post("/v1/chat/completions", body, headers=headers)).status_code == 401
            assert (await live.post(load.path, load.json or {}, headers=headers)).status_code == 401
        assert "conformance/intruder@1" not in await live.adapters()

    @check("INF-103", MUST, "A loaded adapter is listed under its name, and an unloaded one is not.", live=True)
    async def test_adapters_are_listed(self, live: LiveEngine, adapters: dict[str, Path]) -> None:
        name = "conformance/listed@1"
        assert await live.adapters() >= adapters.keys()
        await live.load(name, adapters[ONE])
        assert name in await live.adapters()
        await live.unload(name)
        assert name not in await live.adapters()

    @check("INF-104", MUST, "Two adapters asked at once are each answered as the weights that they are.", live=True)
    async def test_adapters_in_one_batch(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        names = [ONE, TWO] * 8
        answers = await gather_limited(*(live.chat(name, messages=ASK, max_tokens=24) for name in names))
        for name in (ONE, TWO):
            mine = [s for asked, found in zip(names, answers, strict=True) if asked == name for s in found]
            self.assert_answers_as(oracle, mine, adapters[name], name)
            other = oracle.judge(mine, adapters[TWO if name == ONE else ONE])
            assert other.mean > 4 * MEAN_LIMIT, f"the suite's adapters can't be told apart: {other}"

    @check("INF-105", MUST, "Logprobs of tokens sampled at temperature 1 are the policy's own.", live=True)
    async def test_logprobs(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        found = await live.chat(ONE, messages=OTHER_ASK, max_tokens=64, n=4, temperature=1.0)
        self.assert_answers_as(oracle, found, adapters[ONE], "sampling at temperature 1")

    @check(
        *("INF-106", MUST, "Logprobs stay the policy's own under another temperature and top_p."),
        needs=Cap.UNSCALED_LOGPROBS,
        live=True,
    )
    async def test_unscaled_logprobs(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        for settings in ({"temperature": 0.5}, {"temperature": 1.5}, {"temperature": 0.8, "top_p": 0.7}):
            found = await live.chat(ONE, messages=ASK, max_tokens=32, n=2, **settings)
            self.assert_answers_as(oracle, found, adapters[ONE], f"sampling with {settings}")

    @check("INF-107", MUST, "The prompt's token ids are those of the model's chat template.", live=True)
    async def test_prompt_ids(self, live: LiveEngine, oracle: Oracle) -> None:
        for messages in (ASK, OTHER_ASK, [*ASK, {"role": "assistant", "content": "It is so!"}, *ASK]):
            [sample] = await live.chat(ONE, messages=messages, max_tokens=1)
            assert sample.prompt_ids == oracle.chat_ids(messages)

    @check(
        "INF-108",
        MUST,
        "The text of an answer is what its token ids decode to, but for an unfinished character at its end.",
        live=True,
    )
    async def test_text_is_ids(self, live: LiveEngine, oracle: Oracle) -> None:
        for messages in (ASK, SCRIPTS):
            for sample in await live.chat(ONE, messages=messages, max_tokens=32, n=4):
                assert finished(sample.text) == finished(oracle.text(sample.ids))

    @check("INF-109", MUST, "n choices come back as n samples of their own, numbered from 0.", live=True)
    async def test_n(self, live: LiveEngine) -> None:
        found = await live.chat(ONE, messages=ASK, max_tokens=24, n=5, temperature=1.0)
        assert [sample.choice["index"] for sample in found] == [0, 1, 2, 3, 4]
        assert len({tuple(sample.ids) for sample in found}) > 1, "all samples are the same"
        assert len({tuple(sample.prompt_ids) for sample in found}) == 1

    @check("INF-110", SHOULD, "The same seed gives the same sample when nothing else runs.", live=True)
    async def test_seed(self, live: LiveEngine) -> None:
        first, again, other = [
            (await live.chat(ONE, messages=ASK, max_tokens=24, temperature=1.0, seed=seed))[0].ids for seed in (7, 7, 8)
        ]
        assert first == again
        assert first != other

    @check("INF-111", MUST, "A stop string ends the answer and is not part of its text.", live=True)
    async def test_stop(self, live: LiveEngine) -> None:
        [free] = await live.chat(ONE, messages=ASK, max_tokens=48, temperature=0.0)
        printable = [c for c in free.text if c.isascii() and c.isprintable() and not c.isspace()]
        assert printable, "the suite's model said nothing that could be a stop string"
        stop = printable[len(printable) // 2]
        [stopped] = await live.chat(ONE, messages=ASK, max_tokens=48, temperature=0.0, stop=[stop])
        assert stop not in stopped.text
        assert stopped.finish_reason == "stop"
        assert len(stopped.ids) < len(free.ids) or free.text.index(stop) == len(free.text) - 1

    @check("INF-112", MUST, "max_tokens bounds the answer, which then says finish_reason 'length'.", live=True)
    async def test_max_tokens(self, live: LiveEngine) -> None:
        for sample in await live.chat(ONE, messages=ASK, max_tokens=3, n=8):
            assert 1 <= len(sample.ids) <= 3
            assert sample.finish_reason == "length" or len(sample.ids) < 3 or sample.finish_reason == "stop"
            assert sample.finish_reason in ("length", "stop")
        cut = await live.chat(ONE, messages=ASK, max_tokens=1, n=8)
        assert any(sample.finish_reason == "length" for sample in cut)

    @check("INF-113", MUST, "At temperature 0 the most likely token is chosen.", live=True)
    async def test_greedy(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        [sample] = await live.chat(ONE, messages=ASK, max_tokens=16, temperature=0.0)
        table = oracle.next_logprobs([*sample.prompt_ids, *sample.ids], adapters[ONE])
        for position, token in enumerate(sample.ids, start=len(sample.prompt_ids) - 1):
            assert table[position, token] >= table[position].max() - MEAN_LIMIT

    @check("INF-114", MUST, "A prompt of token ids is taken as it is.", live=True)
    async def test_token_prompts(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        prompt = oracle.chat_ids(OTHER_ASK)[3:20]
        found = await live.complete(TWO, prompt=prompt, max_tokens=8, n=2, temperature=1.0)
        assert [sample.prompt_ids for sample in found] == [prompt, prompt]
        self.assert_answers_as(oracle, found, adapters[TWO], "a prompt of token ids")

    @check("INF-115", MUST, "An adapter with B = 0 is answered as the base model.", live=True)
    async def test_identity_adapter(self, live: LiveEngine, oracle: Oracle) -> None:
        found = await live.chat(IDENTITY, messages=ASK, max_tokens=32, n=2)
        self.assert_answers_as(oracle, found, None, "the identity adapter")

    @check(
        *(
            "INF-116",
            MUST,
            "A streamed answer carries its token ids, logprobs and the prompt's ids, and is the policy's.",
        ),
        needs=Cap.STREAMING_TOKEN_IDS,
        live=True,
    )
    async def test_streaming(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        chunks = [chunk async for chunk in live.stream(ONE, messages=ASK, max_tokens=24, temperature=1.0)]
        assert sum(len(chunk.get("choices", ())) for chunk in chunks) > 1, "the answer came in one piece"
        [sample] = merged(chunks)
        assert sample.prompt_ids == oracle.chat_ids(ASK)
        assert sample.finish_reason in ("stop", "length")
        assert finished(sample.text) == finished(oracle.text(sample.ids))
        found = agreement(sample.logprobs, oracle.logprobs(sample.prompt_ids, sample.ids, adapters[ONE]))
        assert found.mean <= MEAN_LIMIT, f"a streamed answer is not the policy's: {found}"

    @check(
        *("INF-117", MUST, "Tools reach the prompt as the chat template writes them."),
        needs=Cap.TOOL_CALLS,
        live=True,
    )
    async def test_tools_reach_prompt(self, live: LiveEngine, oracle: Oracle) -> None:
        [sample] = await live.chat(ONE, messages=ASK, tools=TOOLS, max_tokens=1)
        assert "look_up" in oracle.tokenizer.decode(sample.prompt_ids)
        assert len(sample.prompt_ids) > len(oracle.chat_ids(ASK)) + 10

    @check(
        *("INF-118", MUST, "A tool call that the model writes is parsed back into the answer, its token ids kept."),
        needs=Cap.TOOL_CALLS,
        live=True,
    )
    async def test_tool_calls(
        self, live: LiveEngine, own_tiny_model: Path, conformance_model: Path, tmp_path: Path
    ) -> None:
        if own_tiny_model == conformance_model:
            await self._call_tool(live, IDENTITY)
            return
        # Only the suite's own model says a tool call for certain.
        launch = replace(live.launch, base_model=own_tiny_model, port=port_for_a_server())
        other = await start_engine(live.engine, launch, tmp_path / "server.log")
        try:
            await self._call_tool(other, None)
        finally:
            await other.close()

    async def _call_tool(self, live: LiveEngine, adapter: str | None) -> None:
        [sample] = await live.chat(adapter, messages=ASK, tools=TOOLS, max_tokens=16, temperature=0.0)
        calls = sample.choice["message"].get("tool_calls") or []
        assert [call["function"]["name"] for call in calls] == ["look_up"], f"the model said {sample.text!r}"
        assert "Paris" in calls[0]["function"]["arguments"]
        assert calls[0]["id"]
        assert sample.finish_reason == "tool_calls"
        assert TOOL_CALL.strip() not in sample.text
        assert 3 <= len(sample.ids) <= 5

    @check(
        "INF-133",
        MUST,
        "Every kind of answer, whole, streamed, list or error, is of its schema, and its usage counts its token ids.",
        live=True,
    )
    async def test_schema_of_answers(self, live: LiveEngine) -> None:
        chats: list[dict[str, Any]] = [{"max_tokens": 8, "n": 2}]
        if Cap.TOOL_CALLS in live.engine.capabilities:
            chats.append({"max_tokens": 16, "tools": TOOLS, "temperature": 0.0})
        for settings in chats:
            body = live.prepared("chat/completions", IDENTITY, {"messages": ASK, **settings})
            answer = await live.post("/v1/chat/completions", body)
            assert_chat_completion(live.engine.read_response("chat/completions", answer.json()))
        body = live.prepared("completions", ONE, {"prompt": [5, 6, 7], "max_tokens": 8, "n": 2})
        answer = await live.post("/v1/completions", body)
        assert_completion(live.engine.read_response("completions", answer.json()))
        if Cap.STREAMING_TOKEN_IDS in live.engine.capabilities:
            usage = {"stream_options": {"include_usage": True}}
            assert_chunks([chunk async for chunk in live.stream(ONE, messages=ASK, max_tokens=8, n=2, **usage)])
        assert_models((await live.client.get("/v1/models")).json())
        good = live.prepared("chat/completions", ONE, {"messages": ASK, "max_tokens": 2})
        unknown = live.engine.prepare_request("chat/completions", good, "conformance/never@9")
        bad = (unknown, {**good, "messages": "no list"}, {**good, "temperature": -1.0})
        answers = [await live.post("/v1/chat/completions", body) for body in bad]
        errors = [answer.json() for answer in answers if answer.status_code != 200]
        assert errors, "nothing is an error to this server"
        for error in errors:
            assert_error(error)

    @check(
        "INF-137",
        MUST,
        "A prompt of several scripts and emoji is taken as the chat template writes it, and answered as any other.",
        live=True,
    )
    async def test_prompt_of_several_scripts(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        found = await live.chat(ONE, messages=SCRIPTS, max_tokens=32, n=2)
        for sample in found:
            assert sample.prompt_ids == oracle.chat_ids(SCRIPTS)
        self.assert_answers_as(oracle, found, adapters[ONE], "a prompt of several scripts")

    @check(
        *("INF-138", SHOULD, "All chunks of a streamed answer have one id, also when it has several choices."),
        needs=Cap.STREAMING_TOKEN_IDS,
        live=True,
    )
    async def test_id_of_chunks(self, live: LiveEngine) -> None:
        assert len({chunk["id"] async for chunk in live.stream(ONE, messages=ASK, max_tokens=8, n=2)}) == 1


def finished(text: str) -> str:
    """A text without what is left of a character whose last bytes were not sampled any more."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}").strip()
