"""What a running inference server must do: serve several adapters, each as the weights that it is, and say so exactly.

The oracle is transformers and PEFT in fp32. Nothing is asserted of token ids that depend on what else is in a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from art_core import EngineRefused, InferenceCapability, InferenceEngine, InferenceLaunch

from .dialect_checks import KEY, DialectChecks
from .oracle import Agreement, Oracle, agreement, oracle_for
from .requirements import MUST, SHOULD, check
from .serving import LiveEngine, Sample, gather_limited, port_for_a_server, start_engine
from .tiny_model import TOOL_CALL, write_adapter

Cap = InferenceCapability
MEAN_LIMIT, OUTSIDE_LIMIT = 0.05, 0.05
ONE, TWO, IDENTITY = "conformance/agent@1", "conformance/agent@2", "conformance/agent@0"
ASK: list[Any] = [{"role": "user", "content": "Say something about the city."}]
OTHER_ASK: list[Any] = [
    {"role": "system", "content": "Answer with a word."},
    {"role": "user", "content": "What is the weather, yes or no? 123"},
]
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


class LiveEngineChecks(DialectChecks):
    """The checks of `InferenceEngineConformance` that need a running server."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine_args(cls) -> dict[str, Any]:
        """The engine's own arguments for the server under test. Override when the machine needs some."""
        return {}

    @pytest.fixture(scope="class")
    @classmethod
    def engine_python(cls) -> str:
        """The interpreter of the engine's environment. Override for an engine with an environment of its own."""
        return sys.executable

    @pytest.fixture(scope="class")
    @classmethod
    def adapters(cls, conformance_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        """Adapter folders by the name they are loaded under: two that differ clearly, and the identity."""
        root = tmp_path_factory.mktemp("adapters")
        return {
            ONE: write_adapter(root / "one", conformance_model, seed=11),
            TWO: write_adapter(root / "two", conformance_model, seed=12),
            IDENTITY: write_adapter(root / "identity", conformance_model, seed=13, strength=0.0),
        }

    @pytest.fixture(scope="class")
    @classmethod
    def oracle(cls, conformance_model: Path) -> Oracle:
        return oracle_for(conformance_model)

    @pytest.fixture(scope="class")
    @classmethod
    def launch(
        cls,
        conformance_model: Path,
        engine_args: dict[str, Any],
        engine_python: str,
    ) -> InferenceLaunch:
        """What the server under test is asked to serve: fp32, so that only mistakes differ from the oracle."""
        return InferenceLaunch(
            base_model=conformance_model,
            served_name="base-model",
            host="127.0.0.1",
            port=port_for_a_server(),
            api_key=KEY,
            python=engine_python,
            max_lora_rank=16,
            max_adapters=8,
            dtype="float32",
            engine_args=engine_args,
        )

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def servers(
        cls,
        engine: InferenceEngine,
        launch: InferenceLaunch,
        adapters: dict[str, Path],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> AsyncIterator[list[LiveEngine]]:
        """The server of this class as the only item of a list; `live` starts it, and again after it died."""
        running: list[LiveEngine] = []
        yield running
        for live in running:
            await live.close()

    @pytest_asyncio.fixture(loop_scope="class")
    async def live(
        self,
        servers: list[LiveEngine],
        engine: InferenceEngine,
        launch: InferenceLaunch,
        adapters: dict[str, Path],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> LiveEngine:
        """A running server that holds the three adapters, whatever the check before did to it."""
        if servers and not servers[0].process.running:
            await servers.pop().close()
        if not servers:
            log_file = tmp_path_factory.mktemp("engine") / "server.log"
            servers.append(await start_engine(engine, launch, log_file))
        live = servers[0]
        there = await live.adapters()
        for name, folder in adapters.items():
            if name not in there:
                await live.load(name, folder)
        return live

    def judge(self, oracle: Oracle, samples: list[Sample], adapter: Path | None) -> Agreement:
        """How the logprobs of samples agree with the oracle's for an adapter."""
        said, true = [], []
        for sample in samples:
            said += sample.logprobs
            true += oracle.logprobs(sample.prompt_ids, sample.ids, adapter).tolist()
        return agreement(said, true)

    def assert_answers_as(self, oracle: Oracle, samples: list[Sample], adapter: Path | None, what: str) -> None:
        """Fail unless the logprobs of samples are the oracle's for an adapter."""
        found = self.judge(oracle, samples, adapter)
        assert found.mean <= MEAN_LIMIT, f"{what} is not answered as its weights: {found}"
        assert found.outside <= OUTSIDE_LIMIT, f"{what} is not answered as its weights: {found}"

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
            other = self.judge(oracle, mine, adapters[TWO if name == ONE else ONE])
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
        for sample in await live.chat(ONE, messages=ASK, max_tokens=32, n=4):
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
    async def test_stop(self, live: LiveEngine, oracle: Oracle) -> None:
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
        ids: list[int] = []
        logprobs: list[float] = []
        text, chunks = "", 0
        prompt: Any = None
        finish: Any = None
        async for chunk in live.stream(ONE, messages=ASK, max_tokens=24, temperature=1.0):
            for choice in chunk.get("choices", ()):
                chunks += 1
                ids += choice.get("token_ids") or []
                logprobs += [e["logprob"] for e in (choice.get("logprobs") or {}).get("content") or ()]
                text += (choice.get("delta") or {}).get("content") or ""
                prompt = prompt or choice.get("prompt_token_ids")
                finish = choice.get("finish_reason") or finish
        assert chunks > 1, "the answer came in one piece"
        assert prompt == oracle.chat_ids(ASK)
        assert finish in ("stop", "length")
        assert finished(text) == finished(oracle.text(ids))
        found = agreement(logprobs, oracle.logprobs(prompt, ids, adapters[ONE]))
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

    @check("INF-120", MUST, "An adapter that was never loaded is an error, never the base model's answer.", live=True)
    async def test_unknown_adapter(self, live: LiveEngine) -> None:
        for endpoint, asked in (("chat/completions", {"messages": ASK}), ("completions", {"prompt": [5, 6, 7]})):
            body = live.engine.prepare_request(endpoint, {**asked, "max_tokens": 1}, "conformance/never@9")  # type: ignore[arg-type]
            answer = await live.post(f"/v1/{endpoint}", body)
            assert 400 <= answer.status_code < 500, f"HTTP {answer.status_code}: {answer.text[:500]}"

    @check("INF-121", MUST, "After unloading, a name is an error or still those weights, never others.", live=True)
    async def test_unloaded_adapter(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        name = "conformance/gone@1"
        await live.load(name, adapters[TWO])
        await live.chat(name, messages=ASK, max_tokens=1)
        await live.unload(name)
        body = live.engine.prepare_request("chat/completions", {"messages": ASK, "max_tokens": 16}, name)
        answer = await live.post("/v1/chat/completions", body)
        if answer.status_code == 200:
            found = await live.chat(name, messages=ASK, max_tokens=16)
            self.assert_answers_as(oracle, found, adapters[TWO], "an unloaded adapter")
        else:
            assert 400 <= answer.status_code < 500

    @check(
        "INF-122",
        MUST,
        "A missing, empty or truncated adapter is refused with a reason, the rest still served.",
        live=True,
    )
    async def test_bad_adapters(
        self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle, conformance_model: Path, tmp_path: Path
    ) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        truncated = write_adapter(tmp_path / "truncated", conformance_model, seed=5)
        weights = truncated / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        for kind, folder in (("missing", tmp_path / "missing"), ("empty", empty), ("truncated", truncated)):
            name = f"conformance/{kind}@1"
            with pytest.raises(EngineRefused) as refusal:
                await live.load(name, folder)
            assert len(refusal.value.reason) > 10, f"the refusal of a {kind} adapter gives no reason"
            assert name not in await live.adapters(), f"the {kind} adapter was refused and is listed"
        self.assert_answers_as(
            oracle, await live.chat(ONE, messages=ASK, max_tokens=16), adapters[ONE], "a good adapter after bad ones"
        )

    @check("INF-123", SHOULD, "A name that is loaded is not given to other weights.", live=True)
    async def test_name_taken(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        with contextlib.suppress(EngineRefused):
            await live.load(ONE, adapters[TWO])
        found = await live.chat(ONE, messages=ASK, max_tokens=16, n=2)
        try:
            self.assert_answers_as(oracle, found, adapters[ONE], "a name loaded twice")
        finally:
            # Whatever the engine made of it, the next check finds the right weights under that name.
            await live.unload(ONE)
            await live.load(ONE, adapters[ONE])

    @check(
        "INF-124",
        MUST,
        "Requests in flight stay on their adapter while others are loaded and theirs is unloaded.",
        live=True,
    )
    async def test_in_flight(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        old, new = "conformance/flight@1", "conformance/flight@2"
        await live.load(old, adapters[ONE])
        asking = [asyncio.create_task(live.chat(old, messages=ASK, max_tokens=160, n=2)) for _ in range(4)]
        try:
            await asyncio.sleep(0.2)  # long enough to be under way, and no assertion depends on it
            await live.load(new, adapters[TWO])
            unloading = asyncio.create_task(live.unload(old))
            newer = await live.chat(new, messages=ASK, max_tokens=16, n=2)
            answers = await gather_limited(*asking)
            await unloading
        finally:
            for task in asking:
                task.cancel()
        self.assert_answers_as(oracle, [s for found in answers for s in found], adapters[ONE], "a request in flight")
        self.assert_answers_as(oracle, newer, adapters[TWO], "a request after the load")
        await live.unload(new)

    @check(
        "INF-125", MUST, "Many loads and unloads in a row under load: no request fails, none is mislabelled.", live=True
    )
    async def test_many_publishes(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        folders = [adapters[ONE], adapters[TWO]]
        current, ended = ["conformance/many@0"], asyncio.Event()
        await live.load(current[0], folders[0])
        answers: list[tuple[int, list[Sample]]] = []

        async def keep_asking() -> None:
            while not ended.is_set():
                name = current[0]
                answers.append((int(name.rpartition("@")[2]), await live.chat(name, messages=ASK, max_tokens=12)))

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        try:
            async with asyncio.timeout(240):
                for step in range(1, 21):
                    name = f"conformance/many@{step}"
                    await live.load(name, folders[step % 2])
                    previous, current[0] = current[0], name
                    answered = len(answers)
                    while len(answers) < answered + len(asking):  # everyone has moved on
                        await asyncio.sleep(0.01)
                        assert not any(task.done() for task in asking), "a request failed"
                    await live.unload(previous)
        finally:
            ended.set()
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert not failed, f"a request failed: {failed[0]}"
        for parity in (0, 1):
            mine = [s for step, found in answers if step % 2 == parity for s in found]
            self.assert_answers_as(oracle, mine[:80], folders[parity], f"an adapter of {len(answers)} requests")
        await live.unload(current[0])

    @check(
        "INF-126", MUST, "A prompt longer than the context is a 4xx that says so, and the server goes on.", live=True
    )
    async def test_context_too_long(self, live: LiveEngine, conformance_model: Path) -> None:
        context = json.loads((conformance_model / "config.json").read_bytes())["max_position_embeddings"]
        body = live.engine.prepare_request("completions", {"prompt": [5] * (context + 10), "max_tokens": 4}, ONE)
        answer = await live.post("/v1/completions", body)
        assert 400 <= answer.status_code < 500, f"HTTP {answer.status_code}"
        assert str(context) in answer.text, f"the error does not say how long the context is: {answer.text[:500]}"
        assert await live.chat(ONE, messages=ASK, max_tokens=2)

    @check("INF-127", MUST, "A request that makes no sense is a 4xx with a reason, and the server goes on.", live=True)
    async def test_bad_requests(self, live: LiveEngine) -> None:
        good = live.engine.prepare_request("chat/completions", {"messages": ASK, "max_tokens": 2}, ONE)
        for change in ({"messages": "no list"}, {"max_tokens": -3}, {"temperature": -1.0}, {"n": 0}, {"top_p": 3.0}):
            answer = await live.post("/v1/chat/completions", {**good, **change})
            assert 400 <= answer.status_code < 500, f"{change} gave HTTP {answer.status_code}: {answer.text[:300]}"
            assert len(answer.text) > 10
        headers = {"Content-Type": "application/json"}
        answer = await live.client.post("/v1/chat/completions", content=b"{not json", headers=headers)
        assert 400 <= answer.status_code < 500
        assert await live.chat(ONE, messages=ASK, max_tokens=2)

    @check("INF-128", MUST, "A client that goes away in mid-answer harms no other request.", live=True)
    async def test_client_goes_away(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        staying = asyncio.create_task(live.chat(TWO, messages=ASK, max_tokens=64))
        going = [asyncio.create_task(live.chat(ONE, messages=ASK, max_tokens=400, n=4)) for _ in range(3)]
        await asyncio.sleep(0.2)  # long enough to be under way, and no assertion depends on it
        for task in going:
            task.cancel()
        await asyncio.gather(*going, return_exceptions=True)
        [found] = await gather_limited(staying)
        self.assert_answers_as(oracle, found, adapters[TWO], "another's request")

    @check(
        *("INF-130", MUST, "While paused, requests wait; after resuming, they are answered."),
        needs=Cap.PAUSE,
        live=True,
    )
    async def test_pause(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        before = asyncio.create_task(live.chat(ONE, messages=ASK, max_tokens=200, n=2))
        await asyncio.sleep(0.1)  # long enough to be under way, and no assertion depends on it
        await live.control(live.engine.pause())
        try:
            during = asyncio.create_task(live.chat(TWO, messages=ASK, max_tokens=4))
            await asyncio.sleep(1.0)
            assert not during.done(), "a request was answered while the engine was paused"
        finally:
            await live.control(live.engine.resume())
        found_before, found_during = await gather_limited(before, during)
        self.assert_answers_as(oracle, found_before, adapters[ONE], "a request in flight at the pause")
        self.assert_answers_as(oracle, found_during, adapters[TWO], "a request made in the pause")

    @check(
        *("INF-131", MUST, "After sleeping and waking, every adapter answers as before."), needs=Cap.SLEEP, live=True
    )
    async def test_sleep(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        await live.control(live.engine.sleep())
        await live.control(live.engine.wake())
        assert await live.adapters() >= adapters.keys()
        for name in (ONE, TWO):
            found = await live.chat(name, messages=ASK, max_tokens=16, n=2)
            self.assert_answers_as(oracle, found, adapters[name], f"{name} after waking")

    @check(
        *("INF-132", MUST, "The base model and adapters asked at once are each answered right."),
        needs=Cap.BASE_BESIDE_ADAPTERS,
        live=True,
    )
    async def test_base_beside_adapters(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        names = [None, ONE] * 6
        answers = await gather_limited(*(live.chat(name, messages=ASK, max_tokens=24) for name in names))
        for name in (None, ONE):
            mine = [s for asked, found in zip(names, answers, strict=True) if asked == name for s in found]
            self.assert_answers_as(oracle, mine, None if name is None else adapters[name], name or "the base model")

    @check("INF-140", MUST, "The server's log never holds the API key.", live=True)
    async def test_log_holds_no_key(self, live: LiveEngine) -> None:
        log = live.process.log_file.read_text(errors="replace")
        assert log.strip() or live.process.running
        assert KEY not in log

    @check("INF-141", MUST, "On SIGTERM the server leaves within its plan's stop_timeout_s.", live=True)
    async def test_stops(self, live: LiveEngine) -> None:
        plan = live.engine.launch(live.launch)
        async with asyncio.timeout(plan.stop_timeout_s + 30):
            ended = await live.process.stop()
        # A server that had to be killed ends with -9 (or 137 from the shell's view of it).
        assert ended.code not in (-9, 137), f"it had to be killed after {plan.stop_timeout_s:g} s: {ended.last_lines}"


def finished(text: str) -> str:
    """A text without what is left of a character whose last bytes were not sampled any more."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}").strip()
