"""What a lease must hold: a step stays served under its own name for as long as anybody holds it.

Part of `BackendConformance`; applies to backends that declare leases.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from art_core import BackendCapability
from art_core.errors import CheckpointInUse, CheckpointNotFound

from .agents import RATE, SMALL_RATE, Agent, version_of
from .backend_fixtures import BackendSuite
from .oracle import Oracle
from .requirements import MUST, check

Cap = BackendCapability


class LeaseChecks(BackendSuite):
    """The checks of leases."""

    @check(
        *("BCK-020", MUST, "A leased step is served under its own name until the lease ends, whatever is published."),
        needs=Cap.LEASES,
        live=True,
    )
    async def test_lease(self, agent: Agent, oracle: Oracle) -> None:
        await agent.train()
        async with agent.backend.lease(agent.model) as name:
            assert name == agent.named(1)
            for _ in range(3):
                await agent.train(learning_rate=RATE / 4)
            found = await agent.ask(name, n=4)
            assert {version_of(sample) for sample in found} == {1}
            self.assert_answers_as(oracle, found, await agent.folder(1), [await agent.folder(4)])
        assert {version_of(sample) for sample in await agent.ask()} == {4}

    @check(
        *(
            "BCK-033",
            MUST,
            "A step that several hold stays until the last lets go; one that isn't there can't be held.",
        ),
        needs=Cap.LEASES,
        live=True,
    )
    async def test_several_holders(self, agent: Agent) -> None:
        backend, model = agent.backend, agent.model
        await agent.train(learning_rate=SMALL_RATE)
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            names = [await stack.enter_async_context(backend.lease(model, 0)) for stack in (first, second)]
            assert names[0] == names[1] == agent.named(0)
            await first.aclose()
            await agent.train(learning_rate=SMALL_RATE)
            assert {version_of(sample) for sample in await agent.ask(names[1], max_tokens=4)} == {0}
            if Cap.DELETE_CHECKPOINTS in backend.capabilities:
                with pytest.raises(CheckpointInUse):
                    await backend.delete_checkpoints(model, [0])
        if Cap.DELETE_CHECKPOINTS in backend.capabilities:
            assert await backend.delete_checkpoints(model, [0]) == [0]
        with pytest.raises(CheckpointNotFound):
            async with backend.lease(model, 99):
                pass
