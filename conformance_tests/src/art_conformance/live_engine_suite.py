"""The server under test, its adapters and the oracle, for the checks of inference engines that need a running one.

The oracle is transformers and PEFT in fp32. Nothing is asserted of token ids that depend on what else is in a batch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from art_core import InferenceEngine, InferenceLaunch, installed_plugins
from art_engine_kit.environment import Flavour

from .dialect_checks import KEY, DialectChecks
from .oracle import Oracle, oracle_for
from .serving import LiveEngine, Sample, port_for_a_server, start_engine
from .targets import interpreter_of
from .tiny_model import write_adapter

MEAN_LIMIT, OUTSIDE_LIMIT = 0.05, 0.05
ONE, TWO, IDENTITY = "conformance/agent@1", "conformance/agent@2", "conformance/agent@0"
ASK: list[Any] = [{"role": "user", "content": "Say something about the city."}]
OTHER_ASK: list[Any] = [
    {"role": "system", "content": "Answer with a word."},
    {"role": "user", "content": "What is the weather, yes or no? 123"},
]


class LiveEngineSuite(DialectChecks):
    """What the checks of `InferenceEngineConformance` that need a running server share."""

    flavour: ClassVar[Flavour | None] = None

    @pytest.fixture(scope="class")
    @classmethod
    def engine_args(cls) -> dict[str, Any]:
        """The engine's own arguments for the server under test. Override when the machine needs some."""
        return {}

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
        request: pytest.FixtureRequest,
        engine: InferenceEngine,
        conformance_model: Path,
        engine_args: dict[str, Any],
    ) -> InferenceLaunch:
        """What the server under test is asked to serve: fp32, so that only mistakes differ from the oracle."""
        return InferenceLaunch(
            base_model=conformance_model,
            served_name="base-model",
            host="127.0.0.1",
            port=port_for_a_server(),
            api_key=KEY,
            python=interpreter_of(request.config, installed_plugins().inference_engine, engine.name, cls.flavour),
            max_lora_rank=16,
            max_adapters=8,
            dtype="float32",
            engine_args=engine_args,
        )

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def servers(cls) -> AsyncIterator[list[LiveEngine]]:
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
        """A running server that holds the three adapters, whatever the check before did to it.

        One that can't be loaded fails only the checks that ask for it, so that a report says of each what is true.
        """
        if servers and not servers[0].process.running:
            await servers.pop().close()
        if not servers:
            log_file = tmp_path_factory.mktemp("engine") / "server.log"
            servers.append(await start_engine(engine, launch, log_file))
        await servers[0].hold(adapters)
        return servers[0]

    def assert_answers_as(self, oracle: Oracle, samples: list[Sample], adapter: Path | None, what: str) -> None:
        """Fail unless the logprobs of samples are the oracle's for an adapter."""
        found = oracle.judge(samples, adapter)
        assert found.mean <= MEAN_LIMIT, f"{what} is not answered as its weights: {found}"
        assert found.outside <= OUTSIDE_LIMIT, f"{what} is not answered as its weights: {found}"
