"""Real vLLM servers, in the environment that art-runtime makes for them: the conformance suite, real weights, and its
own traps.
"""

from __future__ import annotations

from typing import ClassVar

import pytest

from art_conformance import InferenceEngineConformance
from art_conformance.served_weights import ServedWeights
from art_conformance.serving import LiveEngine
from art_core import InferenceEngine
from art_engine_kit.environment import Flavour
from art_engine_kit.server_options import options_of
from art_engine_vllm.environment import OPTIONS
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_options_are_those_of_the_real_parser() -> None:
    [card] = art_register_inference_engines()
    assert options_of(python_for(card, flavour="cpu"), OPTIONS) == ARGUMENTS, "server_options writes options.py anew"
