"""What must become of a call that is cancelled: nothing half done, and the same call afterwards works.

Part of `BackendConformance`. Each call is cancelled at its first await, at its second, third, fifth
and so on until it has no more. Knows no backend.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from safetensors.numpy import load_file

from art_core import ArtError, BackendCapability, CheckpointRef
from art_core.errors import ModelBusy
from art_engine_kit.checkpoint_folder import ADAPTER_WEIGHTS

from .agents import SMALL_RATE, Agent, version_of
from .backend_fixtures import BackendSuite, NewAgent
from .requirements import MUST, check
from .serving import REQUEST_LIMIT_S

Cap = BackendCapability
T = TypeVar("T")
# What was cancelled may end elsewhere all the same, and is published then.
BUSY_LIMIT_S, SETTLING_LIMIT_S = 60.0, 10.0


class CancelledAt(Generic[T]):
    """Awaits some work in the task that awaits this, and cancels that task when the work waits for the `moment`th
    time.
    """

    def __init__(self, work: Coroutine[Any, Any, T], moment: int) -> None:
        self._work, self._moment = work, moment

    def __await__(self) -> Generator[Any, None, T]:
        task = asyncio.current_task()
        assert task is not None
        inner = self._work.__await__()
        waits, go_on = 0, partial(inner.send, None)
        while True:
            try:
                waited = go_on()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            waits += 1
            if waits == self._moment:
                task.cancel()
            try:
                yield waited
                go_on = partial(inner.send, None)
            except BaseException as error:
                go_on = partial(inner.throw, error)


async def cancelled_ever_later(call: Callable[[], Coroutine[Any, Any, T]], look: Callable[[], Awaitable[object]]) -> T:
    """Make a call again and again, cancelled at an ever later await, until it ends before that; gives what it gave.
    `look` is done after each.

    One that finds the model busy with what was cancelled before is made again.
    """
    moment, later, deadline = 1, 1, time.monotonic() + BUSY_LIMIT_S
    while True:
        task = asyncio.create_task(_awaited(CancelledAt(call(), moment)))
        done, _ = await asyncio.wait({task}, timeout=REQUEST_LIMIT_S)
        task.cancel()
        assert done, f"cancelled at its await number {moment}, the call didn't end"
        if not task.cancelled() and isinstance(task.exception(), ModelBusy) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            continue
        await look()
        if not task.cancelled():
            return task.result()
        moment, later, deadline = moment + later, moment, time.monotonic() + BUSY_LIMIT_S


async def _awaited(work: Awaitable[T]) -> T:
    return await work


class CancellationChecks(BackendSuite):
    """The check of cancelled calls."""

    @check(
        "BCK-040",
        MUST,
        "Registering, training, leasing, deleting and forking may be cancelled at any await: no step is half there, and"
        " the same call afterwards works.",
        live=True,
    )
    async def test_cancelled(self, backend: Any, new_agent: NewAgent, tmp_path: Path) -> None:
        first = await new_agent(backend=backend)
        agent = await self._registered(first, new_agent)
        await self._trained(agent, tmp_path)
        look = partial(self._whole, agent)
        step = await self._whole(agent)
        if Cap.LEASES in backend.capabilities:
            await cancelled_ever_later(lambda: _held(agent), look)
        await agent.train(learning_rate=SMALL_RATE)
        if Cap.DELETE_CHECKPOINTS in backend.capabilities:
            # It would be refused if a cancelled lease held it still.
            await cancelled_ever_later(lambda: backend.delete_checkpoints(agent.model, [step]), look)
            assert step not in await backend.list_steps(agent.model), "it is still there, though it was deleted"
        if Cap.FORK in backend.capabilities:
            await cancelled_ever_later(lambda: _forked(first, agent), partial(self._whole, first))
            assert await self._whole(first) > 0, "it was forked at last, and is where it was"
        await self._whole(agent)

    async def _registered(self, first: Agent, new_agent: NewAgent) -> Agent:
        model = replace(first.model, name=f"{first.model.name}-cancelled")
        await cancelled_ever_later(lambda: first.backend.register(model), partial(self._whole, first))
        agent = await new_agent(backend=first.backend, name=model.name)
        assert await self._whole(agent) == 0
        return agent

    async def _trained(self, agent: Agent, tmp_path: Path) -> None:
        groups = await agent.groups()

        async def breathe(_: CheckpointRef) -> None:
            await asyncio.sleep(0)

        # One await more, between a step's saving and its publication.
        agent.heard.before_publish = breathe
        result = await cancelled_ever_later(
            lambda: agent.backend.train(agent.model, groups, learning_rate=SMALL_RATE), partial(self._whole, agent)
        )
        assert await self._whole(agent) == result.step
        if Cap.PULL not in agent.backend.capabilities:
            return
        for step in await agent.backend.list_steps(agent.model):
            folder = await agent.backend.pull_checkpoint(agent.model, step=step, local_path=tmp_path / f"step-{step}")
            assert all(np.isfinite(values).all() for values in load_file(folder / ADAPTER_WEIGHTS).values()), step

    async def _whole(self, agent: Agent) -> int:
        """The served step, which must be the last that is kept, and answer."""
        deadline = time.monotonic() + SETTLING_LIMIT_S
        while True:
            step = await agent.backend.get_step(agent.model)
            latest = max(await agent.backend.list_steps(agent.model))
            versions = {version_of(sample) for sample in await agent.ask(max_tokens=2)}
            if latest == step and versions == {step}:
                return step
            late = time.monotonic() > deadline
            assert not late, f"step {step} is served, step {latest} is the last that is kept, and {versions} answer"
            await asyncio.sleep(0.1)


async def _held(agent: Agent) -> None:
    async with agent.backend.lease(agent.model):
        await asyncio.sleep(0)


async def _forked(agent: Agent, source: Agent) -> None:
    # One that was cancelled too late is done, and there may be no second.
    with suppress(ArtError):
        await agent.backend.fork_checkpoint(agent.model, source.model.name)
