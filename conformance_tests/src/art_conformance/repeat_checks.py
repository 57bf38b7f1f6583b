"""What must become of a call that is made twice: it is done, or refused in words, and what remains is served as before.

Part of `BackendConformance`; that two registrations are one and that close may be called twice, other checks say.
"""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

from art_core import ArtError, BackendCapability
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

from .agents import SMALL_RATE, Agent, version_of
from .backend_fixtures import BackendSuite, NewAgent
from .requirements import MUST, check

Cap = BackendCapability
T = TypeVar("T")


class RepeatChecks(BackendSuite):
    """The check of repeated calls."""

    @check(
        "BCK-039",
        MUST,
        "What is asked for twice, a step deleted, pulled or forked, a model registered, is done or refused in words,"
        " and what remains is served as before.",
        live=True,
    )
    async def test_asked_twice(self, agent: Agent, new_agent: NewAgent, tmp_path: Path) -> None:
        backend, model = agent.backend, agent.model
        for _ in range(3):
            await agent.train(learning_rate=SMALL_RATE)
        await backend.register(model)
        kept = set(await backend.list_steps(model))
        await self._serves(agent, 3, kept)
        if Cap.DELETE_CHECKPOINTS in backend.capabilities:
            for steps in ([1], [1], [0, 0], [0, 1], []):
                deleted = await _done_or_refused(backend.delete_checkpoints(model, steps))
                assert (deleted or []) == sorted(kept & set(steps)), f"of {steps} were deleted: {deleted}"
                kept -= set(steps)
                await self._serves(agent, 3, kept)
            told = agent.heard.names("art_checkpoint_deleted")
            assert len(told) == 2, f"two steps were deleted, and plugins were told {len(told)} times"
        if Cap.PULL in backend.capabilities:
            for _ in range(2):
                await _done_or_refused(backend.pull_checkpoint(model, step=3, local_path=tmp_path / "pulled"))
                for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                    assert (tmp_path / "pulled" / name).is_file()
        if Cap.FORK in backend.capabilities:
            other = await new_agent(backend=backend)
            first = await backend.fork_checkpoint(other.model, model.name)
            again = await _done_or_refused(backend.fork_checkpoint(other.model, model.name))
            assert {version_of(sample) for sample in await other.ask()} == {again or first}
            await self._serves(agent, 3, kept)
        assert (await agent.train(learning_rate=SMALL_RATE)).step == 4

    async def _serves(self, agent: Agent, step: int, kept: set[int]) -> None:
        assert await agent.backend.get_step(agent.model) == step
        assert set(await agent.backend.list_steps(agent.model)) == kept
        for name in (None, agent.named(step)):
            assert {version_of(sample) for sample in await agent.ask(name, max_tokens=4)} == {step}


async def _done_or_refused(call: Awaitable[T]) -> T | None:
    """What it gives, None where it is refused with one of ART's own errors or with what the file system said."""
    said = None
    try:
        return await call
    except (ArtError, FileExistsError) as refusal:
        said = str(refusal)
    assert said, "it is refused, and nothing is said"
    return None
