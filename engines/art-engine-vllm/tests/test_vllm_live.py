"""Real vLLM servers, in the environment that art-runtime makes for them: the conformance suite, real weights, and its
own traps.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import ClassVar

import pytest

from art_conformance import InferenceEngineConformance
from art_conformance.served_weights import ServedWeights
from art_conformance.serving import LiveEngine
from art_core import InferenceEngine
from art_engine_kit import hermes_calls
from art_engine_kit.environment import Flavour
from art_engine_kit.server_options import options_of
from art_engine_vllm.environment import OPTIONS, SERVE
from art_engine_vllm.inference_engine import VllmInferenceEngine
from art_engine_vllm.options import ARGUMENTS
from art_engine_vllm.plugin import art_register_inference_engines
from art_runtime.environments import python_for


class OnACpu:
    flavour: ClassVar[Flavour] = "cpu"

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls) -> InferenceEngine:
        return VllmInferenceEngine(cls.flavour)


@pytest.mark.slow
@pytest.mark.timeout(1500)
class TestVllm(OnACpu, InferenceEngineConformance):
    """A tiny model."""


class TestVllmServes(OnACpu, ServedWeights):
    """Real weights."""

    async def test_every_path_asks_for_the_key(self, live: LiveEngine) -> None:
        for path in ("/pause", "/resume", "/sleep", "/collective_rpc", "/v1/load_lora_adapter", "/metrics"):
            answer = await live.post(path, {}, headers={"Authorization": ""})
            assert answer.status_code == 401, f"{path} is open to everyone on this machine"
        assert (await live.client.get("/health", headers={"Authorization": ""})).status_code == 200

    async def test_a_short_prompt_is_computed_once_for_all_who_ask_it(self, live: LiveEngine) -> None:
        async def kept() -> float:
            lines = (await live.client.get("/metrics")).text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

        before = await kept()
        body = {"model": live.launch.served_name, "prompt": [*range(1000, 1080)], "max_tokens": 1, "n": 8}
        (await live.post("/v1/completions", body)).raise_for_status()
        assert await kept() - before >= 7 * 64

    async def test_lora_is_computed_by_adapter(self, live: LiveEngine) -> None:
        assert "Using PunicaWrapperByAdapter" in live.process.log_file.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_options_are_those_of_the_real_parser() -> None:
    [card] = art_register_inference_engines()
    assert options_of(python_for(card, flavour="cpu"), OPTIONS) == ARGUMENTS, "server_options writes options.py anew"


# Run by the engine's own Python: the calls in a text, whole and letter by letter.
PARSE = """
import json, sys, types
import art_vllm_tools

def parser():
    return art_vllm_tools.ArtHermesToolParser(types.SimpleNamespace(get_vocab=lambda: {}))

text, streaming, streamed = sys.argv[1], parser(), {}
whole = parser().extract_tool_calls(text, None)
for end in range(1, len(text) + 1):
    before, now = text[: end - 1], text[:end]
    delta = streaming.extract_tool_calls_streaming(before, now, text[end - 1], [], [], [], None)
    for call in (delta.tool_calls or []) if delta else []:
        said = streamed.setdefault(call.index, ["", ""])
        said[0] += call.function.name or ""
        said[1] += call.function.arguments or ""
calls = [[call.function.name, call.function.arguments] for call in whole.tool_calls]
print(json.dumps({"content": whole.content, "whole": calls, "streamed": list(streamed.values())}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_call_ends_where_its_json_ends_whole_and_streamed() -> None:
    [card] = art_register_inference_engines()
    python = python_for(card, flavour="cpu")
    calls = [("write", {"text": "a </tool_call> b <tool_call> c"}), ("look_up", {"city": "Köln"})]
    written = [f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls]
    answer = subprocess.run(
        [python, "-c", PARSE, "First. " + "\n".join(written)],
        env={**os.environ, "PYTHONPATH": str(SERVE.parent), "ART_HERMES_CALLS": hermes_calls.__file__},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["content"] == "First."
    for way in ("whole", "streamed"):
        assert [(name, json.loads(arguments)) for name, arguments in found[way]] == calls
