"""Real SGLang servers, in the environment that art-runtime makes for them: the conformance suite, real weights, and its
own traps.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from art_conformance import InferenceEngineConformance
from art_conformance.oracle import Oracle, agreement
from art_conformance.served_weights import ASK, ONE, TWO, ServedWeights
from art_conformance.serving import LiveEngine
from art_core import InferenceEngine
from art_engine_kit import hermes_calls
from art_engine_kit.environment import Flavour
from art_engine_kit.server_options import options_of
from art_engine_sglang.environment import ENVIRONMENT, OPTIONS, SERVE
from art_engine_sglang.inference_engine import SglangInferenceEngine
from art_engine_sglang.options import ARGUMENTS
from art_engine_sglang.plugin import art_register_inference_engines
from art_runtime.environments import python_for


class OnACpu:
    flavour: ClassVar[Flavour] = "cpu"

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> InferenceEngine:
        return SglangInferenceEngine(cls.flavour)


@pytest.mark.slow
@pytest.mark.timeout(1500)
class TestSglang(OnACpu, InferenceEngineConformance):
    """A tiny model."""

    known_failures: ClassVar = {"INF-110": "SGLang heeds a seed only in a mode that its CPU path doesn't have."}


class TestSglangServes(OnACpu, ServedWeights):
    """Real weights."""

    async def test_an_unloaded_name_still_means_its_own_weights(
        self, live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]
    ) -> None:
        # SGLang loads it again from its folder. That is harmless as long as no name is ever given to other weights.
        await live.load("served/agent@5", adapters[TWO])
        await live.unload("served/agent@5")
        assert "served/agent@5" not in await live.adapters()
        samples = await live.chat("served/agent@5", messages=ASK, max_tokens=16, temperature=1.0)
        self.held(oracle, samples, adapters[TWO], "sglang, after unloading")

    async def test_a_name_without_a_colon_would_be_the_base_model(self, live: LiveEngine, oracle: Oracle) -> None:
        body = {"messages": ASK, "max_tokens": 16, "temperature": 1.0}
        prepared = live.engine.prepare_request("chat/completions", body, ONE)
        answer = await live.post("/v1/chat/completions", {**prepared, "model": ONE})
        [choice] = live.engine.read_response("chat/completions", answer.json())["choices"]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        # The trap itself, so that it is noticed when SGLang mends it; the dialect never falls into it.
        true = oracle.logprobs(choice["prompt_token_ids"], choice["token_ids"], None)
        assert agreement(logprobs, true).mean < self.mean_limit


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_options_are_those_of_the_real_parser() -> None:
    [card] = art_register_inference_engines()
    found = options_of(python_for(card, flavour="cpu"), OPTIONS, ENVIRONMENT.flavours["cpu"].probe_env)
    assert found == ARGUMENTS, "server_options writes options.py anew"


# Run by the engine's own Python: the calls in a text, whole and letter by letter.
PARSE = """
import json, sys
import art_sglang_serve
import art_sglang_tools

def told(result):
    return [[call.tool_index, call.name, call.parameters] for call in result.calls]

text, streaming, streamed = sys.argv[1], art_sglang_tools.ArtHermesDetector(), []
whole = art_sglang_tools.ArtHermesDetector().detect_and_parse(text, [])
said = ""
for letter in text:
    result = streaming.parse_streaming_increment(letter, [])
    streamed += told(result)
    said += result.normal_text
end = streaming.finish([])
texts = [whole.normal_text, said + end.normal_text]
print(json.dumps({"whole": told(whole), "streamed": streamed + told(end), "texts": texts}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_call_ends_where_its_json_ends_whole_and_streamed() -> None:
    [card] = art_register_inference_engines()
    python = python_for(card, flavour="cpu")
    calls = [("write", {"text": "a </tool_call> b <tool_call> c"}), ("look_up", {"city": "Köln"})]
    written = [f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls]
    env = {**os.environ, **ENVIRONMENT.flavours["cpu"].probe_env, "ART_HERMES_CALLS": hermes_calls.__file__}
    env["PYTHONPATH"] = f"{env.get('PYTHONPATH', '')}{os.pathsep}{SERVE.parent}"
    answer = subprocess.run(
        [python, "-c", PARSE, "First. " + "\n".join(written)],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert [text.strip() for text in found["texts"]] == ["First.", "First."]
    for way in ("whole", "streamed"):
        assert [(name, json.loads(arguments)) for _, name, arguments in found[way]] == calls
        assert [index for index, _, _ in found[way]] == [0, 1]
