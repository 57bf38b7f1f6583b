"""What the suites for backends share: one backend for a class, fresh models on it, the oracle, and versions told apart.

The subclass gives `open_backend`; everything else follows from the protocol.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import pytest_asyncio

from art_core import Backend, Capability, installed_plugins

from .agents import Agent, SuiteModel
from .oracle import Oracle, oracle_for
from .recorder import recording
from .serving import Sample
from .suite import Suite

MEAN_LIMIT = 0.1
# After a few large steps the tiny model is so sure that two steps may say the same of a few tokens, in nats.
SAME = 1e-3
NewAgent = Callable[..., Awaitable[Agent]]
OpenBackend = Callable[[Path], Backend]


@asynccontextmanager
async def agents(
    get_backend: Callable[[], Backend],
    base_model: Path,
    folder: Path,
    transport: httpx.AsyncBaseTransport | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AsyncIterator[NewAgent]:
    """Give a function that makes registered models and listens to their hooks until the block is left."""
    limits = httpx.Limits(max_connections=None)
    with ExitStack() as stack:
        async with httpx.AsyncClient(trust_env=False, limits=limits, transport=transport) as client:

            async def make(*, backend: Backend | None = None, **fields: Any) -> Agent:
                chosen = get_backend() if backend is None else backend
                own = {
                    "name": f"agent-{uuid.uuid4().hex[:8]}",
                    "project": "conformance",
                    "base_model": str(base_model),
                    "base_path": str(folder / "models"),
                    "settings": dict(settings or {}),
                }
                model = SuiteModel(**{**own, **fields})
                heard = stack.enter_context(recording(installed_plugins(), model.key))
                registration = await chosen.register(model)
                return Agent(chosen, model, registration, client, heard)

            yield make


class BackendSuite(Suite):
    """Give the fixture `open_backend` (scope="class"): a function that takes a folder of its own and gives a backend.

    The same folder means the same backend again, with what was trained there. `model_settings` is the internal
    configuration of every model, such as engine arguments that this machine needs.
    """

    model_settings: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def open_backend(cls) -> OpenBackend:
        raise pytest.UsageError(
            "give the fixture `open_backend` (scope='class'): a function from a folder to a Backend"
        )

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def backend(
        cls, open_backend: OpenBackend, tmp_path_factory: pytest.TempPathFactory
    ) -> AsyncIterator[Backend]:
        async with open_backend(tmp_path_factory.mktemp("backend")) as backend:
            yield backend

    @pytest.fixture(scope="class")
    @classmethod
    def declared(cls, backend: Backend) -> Collection[Capability]:
        return backend.capabilities

    @pytest.fixture(scope="class")
    @classmethod
    def oracle(cls, conformance_model: Path) -> Oracle:
        return oracle_for(conformance_model)

    @pytest.fixture(scope="class")
    @classmethod
    def transport(cls) -> httpx.AsyncBaseTransport | None:
        """What carries requests to the endpoint; None is the network. Override for a backend without a server."""
        return None

    @pytest_asyncio.fixture(loop_scope="class")
    async def new_agent(
        self,
        request: pytest.FixtureRequest,
        conformance_model: Path,
        tmp_path: Path,
        transport: httpx.AsyncBaseTransport | None,
    ) -> AsyncIterator[NewAgent]:
        """Makes registered models: `await new_agent()`, `await new_agent(name=..., backend=...)`."""
        get_backend = partial(request.getfixturevalue, "backend")
        async with agents(get_backend, conformance_model, tmp_path, transport, self.model_settings) as make:
            yield make

    @pytest_asyncio.fixture(loop_scope="class")
    async def agent(self, backend: Backend, new_agent: NewAgent) -> Agent:
        """A fresh model on the backend of this class, at step 0."""
        return await new_agent(backend=backend)

    def assert_answers_as(
        self, oracle: Oracle, found: Sequence[Sample], adapter: Path | None, others: Sequence[Path | None] = ()
    ) -> None:
        """Fail unless the logprobs of samples are the oracle's for an adapter, and those of no other that says else."""
        mine = oracle.judge(found, adapter)
        assert mine.mean <= MEAN_LIMIT, f"not the weights of {adapter or 'the base model'}: {mine}"
        for other in others:
            theirs = oracle.judge(found, other)
            assert mine.mean < theirs.mean or oracle.apart(found, adapter, other) < SAME, (
                f"rather {other or 'the base model'} ({theirs}) than {adapter} ({mine})"
            )
