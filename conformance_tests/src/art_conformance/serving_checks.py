"""What a running inference server must do with adapters that come and go, with bad requests, and when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from art_core import InferenceCapability
from art_core.errors import EngineRefused
from art_core.names import ModelKey, adapter_name

from .dialect_checks import KEY
from .live_engine_suite import ASK, ONE, TWO, LiveEngineSuite
from .oracle import Oracle
from .requirements import MUST, SHOULD, check
from .serving import LiveEngine, Sample, client_of, gather_limited, in_mid_answer
from .tiny_model import write_adapter

Cap = InferenceCapability
# Two of the longest that a backend may give, which differ in their last character, and two of every sign that it may
# hold, which differ in nothing but capitals.
LONGEST = [adapter_name(ModelKey("p" * 128, "m" * 128), 10**18 - less) for less in (1, 2)]
OF_SIGNS = [adapter_name(ModelKey("0.-_..--__.", name), 0) for name in ("a..-_B.--__.", "A..-_b.--__.")]


class ServingChecks(LiveEngineSuite):
    """The checks of `InferenceEngineConformance` on how it is served."""

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
        "INF-134",
        MUST,
        "Loading an adapter twice, and unloading it twice, is done again harmlessly or refused with a reason.",
        live=True,
    )
    async def test_repeated(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        name = "conformance/repeated@1"
        await live.load(name, adapters[TWO])
        await done_or_refused(live.load(name, adapters[TWO]))
        assert await live.adapters() >= {name, *adapters}
        found = await live.chat(name, messages=ASK, max_tokens=16, n=2)
        self.assert_answers_as(oracle, found, adapters[TWO], "an adapter loaded twice")
        await live.unload(name)
        await done_or_refused(live.unload(name))
        assert await live.adapters() >= adapters.keys(), "another adapter went with one that was unloaded twice"
        found = await live.chat(ONE, messages=ASK, max_tokens=16, n=2)
        self.assert_answers_as(oracle, found, adapters[ONE], "an adapter beside one that was unloaded twice")

    @check(
        "INF-135",
        MUST,
        "An adapter is listed, answers and is unloaded under exactly its name, however long and full of signs.",
        live=True,
    )
    async def test_names(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        for first, second in (LONGEST, OF_SIGNS):
            weights = {first: adapters[ONE], second: adapters[TWO]}
            for name, folder in weights.items():
                await live.load(name, folder)
            assert await live.adapters() >= weights.keys()
            for name, folder in weights.items():
                found = await live.chat(name, messages=ASK, max_tokens=16, n=2)
                self.assert_answers_as(oracle, found, folder, name)
            await live.unload(first)
            assert second in await live.adapters(), f"unloading {first} took {second} along"
            await live.unload(second)

    @check(
        "INF-136",
        MUST,
        "Two clients that load, ask and unload at once, under names of their own, disturb each other in nothing.",
        live=True,
    )
    async def test_two_clients(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        async with client_of(live.launch) as client:
            other = replace(live, client=client)
            # Neither is left at work when the other fails.
            answered = await gather_limited(
                asyncio.gather(
                    come_and_go(live, "conformance/mine", adapters[ONE]),
                    come_and_go(other, "conformance/yours", adapters[TWO]),
                    return_exceptions=True,
                )
            )
        for outcome, name in zip(answered[0], (ONE, TWO), strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            self.assert_answers_as(oracle, outcome, adapters[name], "an adapter of one of two clients")

    @check(
        "INF-124",
        MUST,
        "Requests in flight stay on their adapter while others are loaded and theirs is unloaded.",
        live=True,
    )
    async def test_in_flight(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        old, new = "conformance/flight@1", "conformance/flight@2"
        await live.load(old, adapters[ONE])
        tries = itertools.count(1)

        async def ask() -> list[asyncio.Task[list[Sample]]]:
            # A server may answer a few of them faster than it loads, so each try asks more of it.
            number = 4 * min(next(tries), 12)
            return await gather_limited(*(live.begun(old, messages=ASK, max_tokens=240, n=2) for _ in range(number)))

        async with in_mid_answer(
            ask,
            lambda: live.load(new, adapters[TWO]),
            undo=lambda: live.unload(new),
            needed=any,
            problem="no request was in flight at the load",
        ) as asking:
            unloading = asyncio.create_task(live.unload(old))
            newer = await live.chat(new, messages=ASK, max_tokens=16, n=2)
            answers = await gather_limited(*asking)
            await unloading
        in_flight = [sample for found in answers for sample in found]
        assert_whole(in_flight, "a request in flight")
        self.assert_answers_as(oracle, in_flight, adapters[ONE], "a request in flight")
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
        tries = itertools.count(1)

        async def ask() -> list[asyncio.Task[list[Sample]]]:
            # A fast server may answer a few of them before the last has begun, so each try asks more of it.
            leaving = [(ONE, 400, 4)] * (3 * min(next(tries), 12))
            return await gather_limited(
                *(
                    live.begun(adapter, messages=ASK, max_tokens=tokens, n=n)
                    for adapter, tokens, n in (*leaving, (TWO, 400, 4))
                )
            )

        def still_shows_something(under_way: Iterable[bool]) -> bool:
            *leaving, staying = under_way
            return any(leaving) and staying

        async with in_mid_answer(ask, needed=still_shows_something, problem="an answer was whole too soon") as asked:
            *going, staying = asked
            for task in going:
                task.cancel()
            await asyncio.gather(*going, return_exceptions=True)
            [found] = await gather_limited(staying)
        assert_whole(found, "another's request")
        self.assert_answers_as(oracle, found, adapters[TWO], "another's request")

    @check(
        *("INF-130", MUST, "While paused, requests wait; after resuming, they are answered."),
        needs=Cap.PAUSE,
        live=True,
    )
    async def test_pause(self, live: LiveEngine, adapters: dict[str, Path], oracle: Oracle) -> None:
        began = time.monotonic()
        await live.chat(TWO, messages=ASK, max_tokens=4)
        usual_s = time.monotonic() - began

        async def ask() -> list[asyncio.Task[list[Sample]]]:
            return [await live.begun(ONE, messages=ASK, max_tokens=240, n=2)]

        async def resume() -> None:
            await live.control(live.engine.resume())

        async with in_mid_answer(
            ask,
            lambda: live.control(live.engine.pause()),
            undo=resume,
            needed=all,
            problem="no request was in flight at the pause",
        ) as (before,):
            try:
                during = asyncio.create_task(live.chat(TWO, messages=ASK, max_tokens=4))
                await asyncio.sleep(max(1.0, 5 * usual_s))
                assert not during.done(), "a request was answered while the engine was paused"
            finally:
                await resume()
            found_before, found_during = await gather_limited(before, during)
        assert_whole([*found_before, *found_during], "a request that had to wait")
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
        log = live.process.log_file.read_text(errors="replace", encoding="utf-8")
        assert log.strip() or live.process.running
        assert KEY not in log

    @check("INF-141", MUST, "On SIGTERM the server leaves within its plan's stop_timeout_s.", live=True)
    async def test_stops(self, live: LiveEngine) -> None:
        plan = live.engine.launch(live.launch)
        async with asyncio.timeout(plan.stop_timeout_s + 30):
            ended = await live.process.stop()
        # A server that had to be killed ends with -9 (or 137 from the shell's view of it).
        assert ended.code not in (-9, 137), f"it had to be killed after {plan.stop_timeout_s:g} s: {ended.last_lines}"


def assert_whole(samples: list[Sample], what: str) -> None:
    """Fail when one was ended by anything else than the model or its limit: what it has may still be right."""
    reasons = {sample.finish_reason for sample in samples}
    assert reasons <= {"stop", "length"}, f"{what} was cut short: finish_reason {reasons}"


async def done_or_refused(repeated: Coroutine[Any, Any, None]) -> None:
    """Repeat what was done already. Fails when it is refused and the reason says nothing."""
    refusal = None
    try:
        await repeated
    except EngineRefused as error:
        refusal = error
    # "HTTP 400: " is what every dialect says by itself.
    assert refusal is None or len(refusal.reason.split()) > 4, f"it is refused without a reason: {refusal}"


async def come_and_go(live: LiveEngine, model: str, folder: Path) -> list[Sample]:
    """What an adapter answers that is loaded under three names, one after another."""
    found: list[Sample] = []
    for step in range(3):
        name = f"{model}@{step}"
        await live.load(name, folder)
        assert name in await live.adapters()
        found += await live.chat(name, messages=ASK, max_tokens=16, n=2)
        await live.unload(name)
    return found
