"""A real server on real, pretrained weights: what it samples is held against transformers and PEFT in fp32.

Not a suite with requirements of its own: it shows by figures, printed with `pytest -rP`, how closely an engine that
conforms serves the weights that it was given.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import pytest_asyncio
import torch

from art_core import InferenceEngine, InferenceLaunch, installed_plugins, resolve_base_model
from art_core.errors import EngineRefused
from art_engine_kit.adapter_config import AdapterConfig
from art_engine_kit.adapter_files import write_adapter as write_pairs
from art_engine_kit.base_shapes import linear_shapes
from art_engine_kit.environment import Flavour
from art_engine_kit.plain_adapter import plain_adapter

from .oracle import Agreement, Oracle, agreement, oracle_for
from .serving import LiveEngine, Sample, in_mid_answer, port_for_a_server, start_engine
from .targets import interpreter_of
from .tiny_model import MODULES, write_adapter

MODEL = "smollm2-135m-instruct"
ONE, TWO = "served/agent@1", "served/agent@2"
ASK: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
# Adapters whose scale, rank or choice of modules is not the plain one, by what PEFT calls it.
OTHERWISE: dict[str, dict[str, Any]] = {
    "rsLoRA": {"r": 16, "use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2.0, "down_proj": 64.0, r"layers\.1\..*": 4.0}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "v_proj": 16, "gate_proj": 3}},
    "all of them": {"use_rslora": True, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 1.0, "o_proj": 5.0}},
    "a pattern for target_modules": {"target_modules": r"model\.layers\.[02468]\..*(v|up|o)_proj"},
    "v_proj alone": {"target_modules": ("v_proj",)},
    "some layers": {"target_modules": ("q_proj", "gate_proj"), "layers_to_transform": (0, 3)},
}


class ServedWeights:
    """Give the fixture `engine` (scope="class"). One server, run as `InferenceEngineConformance` runs one, serves all
    tests of the class.

    The limits are on the mean absolute difference of sampled logprobs, in nats, and on the share of tokens whose
    probability ratio lies outside [0.9, 1.1].
    """

    pytestmark: ClassVar = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.asyncio(loop_scope="class")]
    flavour: ClassVar[Flavour | None] = None
    mean_limit: ClassVar[float] = 0.02
    outside_limit: ClassVar[float] = 0.02

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def weights(cls, request: pytest.FixtureRequest) -> Path:
        """The folder of --conformance-model, or of the embedded default model."""
        given = request.config.getoption("--conformance-model")
        return await resolve_base_model(installed_plugins(), str(given or MODEL))

    @pytest.fixture(scope="class")
    @classmethod
    def adapters(cls, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        """Two adapters that differ clearly and leave text that is text, by the names they are served under."""
        root = tmp_path_factory.mktemp("adapters")
        return {
            ONE: write_adapter(root / "one", weights, seed=1, strength=0.05),
            TWO: write_adapter(root / "two", weights, seed=2, strength=0.05),
        }

    @pytest.fixture(scope="class")
    @classmethod
    def oracle(cls, weights: Path) -> Oracle:
        # The server computes too; threads that wait for each other on a busy machine take many times as long.
        torch.set_num_threads(1)
        return oracle_for(weights)

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def live(
        cls,
        request: pytest.FixtureRequest,
        engine: InferenceEngine,
        weights: Path,
        adapters: dict[str, Path],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> AsyncIterator[LiveEngine]:
        """The server in fp32, with both adapters."""
        launch = InferenceLaunch(
            base_model=weights,
            served_name="base",
            host="127.0.0.1",
            port=port_for_a_server(),
            # Begins as an option does.
            api_key="-served-7c1",
            python=interpreter_of(request.config, installed_plugins().inference_engine, engine.name, cls.flavour),
            max_model_len=1024,
            dtype="float32",
        )
        server = await start_engine(engine, launch, tmp_path_factory.mktemp("server") / "server.log")
        try:
            for name, folder in adapters.items():
                await server.load(name, folder)
            yield server
        finally:
            await server.close()

    def held(self, oracle: Oracle, samples: list[Sample], adapter: Path | None, what: str) -> Agreement:
        """How samples agree with an adapter, printed; fails when that is outside the limits."""
        found = oracle.judge(samples, adapter)
        print(f"{what}: {found}")
        assert found.mean < self.mean_limit, f"{what}: {found}"
        assert found.outside < self.outside_limit, f"{what}: {found}"
        return found

    async def test_sampled_logprobs_are_those_of_the_weights(
        self, live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]
    ) -> None:
        settings: dict[str, dict[str, float]] = {ONE: {"temperature": 1.0}, TWO: {"temperature": 0.6, "top_p": 0.9}}
        for (name, sampling), n in zip(settings.items(), (8, 4), strict=True):
            samples = await live.chat(name, messages=ASK, max_tokens=32, n=n, ignore_eos=True, **sampling)
            assert [sample.choice["index"] for sample in samples] == list(range(n))
            words = ", ".join(f"{key} {value:g}" for key, value in sampling.items())
            found = self.held(oracle, samples, adapters[name], f"{live.engine.name}, sampled at {words}")
            other = oracle.judge(samples[:2], adapters[TWO if name == ONE else ONE])
            assert other.mean > 5 * found.mean, f"the two adapters can't be told apart: {other}"

    async def test_a_canary_tells_the_adapters_apart(
        self, live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]
    ) -> None:
        prompt = oracle.chat_ids(ASK)
        for name, folder in adapters.items():
            [sample] = await live.complete(name, prompt=prompt, max_tokens=1, temperature=0, logprobs=1)
            table = oracle.next_logprobs(prompt, folder)[-1]
            assert abs(sample.logprobs[0] - table[sample.ids[0]]) < 0.01

    async def test_requests_in_flight_stay_on_their_adapter(
        self, live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]
    ) -> None:
        old, new = "served/agent@3", "served/agent@4"
        await live.load(old, adapters[ONE])
        long = {"messages": ASK, "max_tokens": 160, "n": 2, "temperature": 1.0, "ignore_eos": True}

        async def ask() -> list[asyncio.Task[list[Sample]]]:
            return [await live.begun(old, **long)]

        async with in_mid_answer(
            ask,
            lambda: live.load(new, adapters[TWO]),
            undo=lambda: live.unload(new),
            needed=all,
            problem="the answer was there before the other adapter was",
        ) as (asking,):
            unloading = asyncio.create_task(live.unload(old))
            newer = await live.chat(new, messages=ASK, max_tokens=16, n=2, temperature=1.0)
            older = await asking
            await unloading
        self.held(oracle, older, adapters[ONE], f"{live.engine.name}, in flight across a load and its own unload")
        self.held(oracle, newer, adapters[TWO], f"{live.engine.name}, on the adapter loaded meanwhile")
        assert old not in await live.adapters()
        await live.unload(new)

    async def test_a_stream_says_the_same_as_its_ids(
        self, live: LiveEngine, oracle: Oracle, adapters: dict[str, Path]
    ) -> None:
        streamed = await live.streamed(ONE, messages=ASK, max_tokens=24, n=2, temperature=1.0)
        assert len(streamed) == 2
        for sample in streamed:
            assert sample.prompt_ids == oracle.chat_ids(ASK)
            assert oracle.text(sample.ids).strip().startswith(sample.text.strip())
            true = oracle.logprobs(sample.prompt_ids, sample.ids, adapters[ONE])
            assert agreement(sample.logprobs, true).mean < self.mean_limit

    async def test_adapters_scaled_and_cut_otherwise_are_served_as_peft_computes_them(
        self, live: LiveEngine, oracle: Oracle, weights: Path, tmp_path: Path
    ) -> None:
        shapes = linear_shapes(weights)
        for number, (kind, settings) in enumerate(OTHERWISE.items()):
            folder = write_scaled_adapter(tmp_path / str(number), weights, settings)
            handed = plain_adapter(folder, shapes, tmp_path / f"{number}-handed")
            assert handed != folder
            name = f"served/otherwise-{number}@1"
            await live.load(name, handed)
            samples = await live.chat(name, messages=ASK, max_tokens=24, n=4, temperature=1.0, ignore_eos=True)
            found = self.held(oracle, samples, folder, f"{live.engine.name}, {kind}")
            without = oracle.judge(samples[:1], None)
            assert without.mean > 5 * found.mean, f"the adapter with {kind} can't be told from the base: {without}"
            await live.unload(name)

    async def test_an_adapter_of_another_rank_is_refused_with_its_reason(
        self, live: LiveEngine, weights: Path, tmp_path: Path
    ) -> None:
        folder = write_adapter(tmp_path / "rank", weights, seed=3, rank=64)
        with pytest.raises(EngineRefused, match=r"rank|64"):
            await live.load("served/rank@1", folder)


def write_scaled_adapter(folder: Path, base_model: Path, settings: dict[str, Any]) -> Path:
    """Write a random adapter with a config of PEFT's, and give its folder. Each module adds about the same whatever its
    rank and scale are, so that one served at another scale is off by as much.
    """
    whole: dict[str, Any] = {"r": 8, "lora_alpha": 16.0, "target_modules": MODULES, **settings}
    config = AdapterConfig(**whole)
    shapes, rng, pairs = linear_shapes(base_model), np.random.default_rng(9), {}
    for module in config.modules(shapes):
        (out_features, in_features), rank = shapes[module], config.rank(module)
        a = rng.standard_normal((rank, in_features)) / np.sqrt(in_features)
        b = rng.standard_normal((out_features, rank)) * 0.1 / np.sqrt(rank) / config.scaling(module)
        pairs[module] = a.astype(np.float32), b.astype(np.float32)
    folder.mkdir()
    write_pairs(folder, config, pairs)
    return folder
