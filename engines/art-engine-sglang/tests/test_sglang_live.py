"""A real SGLang server on real weights: its samples held against transformers and PEFT in fp32, and its own traps.

One server for the whole module, in the environment that art-runtime makes for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from art_conformance.oracle import Oracle, agreement, oracle_for
from art_conformance.serving import LiveEngine, Sample, start_engine
from art_conformance.tiny_model import write_adapter
from art_core import EngineRefused, InferenceLaunch
from art_engine_sglang.environment import CPU_SHIMS, SERVE
from art_engine_sglang.inference_engine import SglangInferenceEngine
from art_engine_sglang.options import ARGUMENTS
from art_engine_sglang.plugin import art_register_inference_engines
from art_engine_torch.base_model import resolve_base_model
from art_runtime import free_port
from art_runtime.environments import python_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.timeout(1500),
    pytest.mark.asyncio(loop_scope="module"),
]
ONE, TWO = "live/agent@1", "live/agent@2"
ASK = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module")
def base() -> Path:
    folder = resolve_base_model("smollm2-135m-instruct")
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def python() -> str:
    [spec] = art_register_inference_engines()
    return python_for(spec, auto_install=True)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        ONE: write_adapter(root / "one", base, seed=1, strength=0.05),
        TWO: write_adapter(root / "two", base, seed=2, strength=0.05),
    }


@pytest.fixture(scope="module")
def oracle(base: Path) -> Oracle:
    # The server computes too; threads that wait for each other on a busy machine take many times as long.
    torch.set_num_threads(1)
    return oracle_for(base)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(
    base: Path, python: str, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveEngine]:
    launch = InferenceLaunch(
        base_model=base,
        served_name="base",
        host="127.0.0.1",
        port=free_port(),
        api_key="sk-live-7c1",
        python=python,
        max_model_len=1024,
        dtype="float32",
    )
    log_file = tmp_path_factory.mktemp("server") / "server.log"
    server = await start_engine(SglangInferenceEngine(), launch, log_file)
    try:
        for name, folder in adapters.items():
            await server.load(name, folder)
        yield server
    finally:
        await server.close()


def held(oracle: Oracle, samples: list[Sample], adapter: Path | None) -> Any:
    said, true = [], []
    for sample in samples:
        said += sample.logprobs
        true += oracle.logprobs(sample.prompt_ids, sample.ids, adapter).tolist()
    return agreement(said, true)


async def test_sampled_logprobs_are_those_of_the_weights(
    live: LiveEngine, oracle: Oracle, adapters: dict[str, Path], record_property: Any
) -> None:
    for name, settings in ((ONE, {"temperature": 1.0}), (TWO, {"temperature": 0.6, "top_p": 0.9})):
        samples = await live.chat(name, messages=ASK, max_tokens=32, n=8, **settings)
        assert [sample.choice["index"] for sample in samples] == list(range(8))
        found = held(oracle, samples, adapters[name])
        record_property(f"{name} {settings}", str(found))
        print(f"sglang {name} {settings}: {found}")
        assert found.mean < 0.02, f"{name} with {settings}: {found}"
        assert found.outside < 0.02, f"{name} with {settings}: {found}"
        other = held(oracle, samples[:2], adapters[TWO if name == ONE else ONE])
        assert other.mean > 5 * found.mean, f"the two adapters can't be told apart: {other}"


async def test_a_canary_tells_the_adapters_apart(live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]) -> None:
    prompt = oracle.chat_ids(ASK)
    for name, folder in adapters.items():
        [sample] = await live.complete(name, prompt=prompt, max_tokens=1, temperature=0, logprobs=1)
        table = oracle.next_logprobs(prompt, folder)[-1]
        assert abs(sample.logprobs[0] - table[sample.ids[0]]) < 0.01


async def test_a_request_in_flight_stays_on_its_adapter(
    live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]
) -> None:
    await live.load("live/agent@3", adapters[ONE])
    asking = asyncio.create_task(live.chat("live/agent@3", messages=ASK, max_tokens=64, n=2, temperature=1.0))
    await asyncio.sleep(1.0)  # long enough to be under way, and no assertion depends on it
    await live.load("live/agent@4", adapters[TWO])
    unloading = asyncio.create_task(live.unload("live/agent@3"))
    newer = await live.chat("live/agent@4", messages=ASK, max_tokens=16, temperature=1.0)
    older = await asking
    await unloading
    assert held(oracle, older, adapters[ONE]).mean < 0.02
    assert held(oracle, newer, adapters[TWO]).mean < 0.02
    assert "live/agent@3" not in await live.adapters()
    await live.unload("live/agent@4")


async def test_a_stream_says_the_same_as_its_ids(live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]) -> None:
    ids: dict[int, list[int]] = {0: [], 1: []}
    text, logprobs, prompts = {0: "", 1: ""}, {0: [], 1: []}, {}
    async for chunk in live.stream(ONE, messages=ASK, max_tokens=24, n=2, temperature=1.0):
        for choice in chunk["choices"]:
            index = choice["index"]
            ids[index] += choice["token_ids"]
            text[index] += (choice.get("delta") or {}).get("content") or ""
            logprobs[index] += [e["logprob"] for e in (choice.get("logprobs") or {}).get("content") or ()]
            if choice.get("prompt_token_ids"):
                prompts[index] = choice["prompt_token_ids"]
    for index in (0, 1):
        assert prompts[index] == oracle.chat_ids(ASK)
        assert oracle.text(ids[index]).strip().startswith(text[index].strip())
        found = agreement(logprobs[index], oracle.logprobs(prompts[index], ids[index], adapters[ONE]))
        assert found.mean < 0.02


async def test_an_unloaded_name_still_means_its_own_weights(
    live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]
) -> None:
    # SGLang loads it again from its folder. That is harmless only as long as no name is ever given to other weights.
    await live.load("live/agent@5", adapters[TWO])
    await live.unload("live/agent@5")
    assert "live/agent@5" not in await live.adapters()
    samples = await live.chat("live/agent@5", messages=ASK, max_tokens=16, temperature=1.0)
    assert held(oracle, samples, adapters[TWO]).mean < 0.02


async def test_a_name_without_a_colon_would_be_the_base_model(
    live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]
) -> None:
    body = {"messages": ASK, "max_tokens": 16, "temperature": 1.0}
    prepared = live.engine.prepare_request("chat/completions", body, ONE)
    answer = await live.post("/v1/chat/completions", {**prepared, "model": ONE})
    [choice] = live.engine.read_response("chat/completions", answer.json())["choices"]
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    # The trap itself, so that it is noticed when SGLang mends it; the dialect names the adapter so that it never shuts.
    true = oracle.logprobs(choice["prompt_token_ids"], choice["token_ids"], None)
    assert agreement(logprobs, true).mean < 0.02


async def test_an_adapter_of_another_rank_is_refused_with_its_reason(
    live: LiveEngine, base: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "rank", base, seed=3, rank=64)
    with pytest.raises(EngineRefused, match="rank"):
        await live.load("live/rank@1", folder)


async def test_the_options_are_those_of_the_real_parser(python: str) -> None:
    script = SERVE.with_name("art_sglang_options.py")
    env = {**os.environ, "PYTHONPATH": str(CPU_SHIMS), "SGLANG_USE_CPU_ENGINE": "1"}
    answer = await asyncio.to_thread(
        subprocess.run, [python, str(script)], capture_output=True, text=True, timeout=600, env=env
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    for kind in ("values", "lists", "flags", "switches"):
        assert getattr(ARGUMENTS, kind) == set(found[kind]), "write_options.py writes options.py anew"
