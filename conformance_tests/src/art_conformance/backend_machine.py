"""A backend used in every order, held against a flat record of what must follow: which steps are served, kept and held.

Part of `BackendConformance`. Hypothesis chooses the order from a seed, so that every run of it is the same; the machine
runs on a thread and the backend on the event loop, as its callers do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from art_core import ArtError, Backend, BackendCapability, TrajectoryGroup
from art_core.errors import CheckpointInUse, CheckpointNotFound

from .agents import SMALL_RATE, Agent, version_of
from .backend_fixtures import BackendSuite, NewAgent, OpenBackend
from .requirements import MUST, check
from .serving import REQUEST_LIMIT_S
from .spoiled import SPOILED

Cap = BackendCapability
T = TypeVar("T")
# An engine holds few steps at once, and one more is loaded before the old one goes.
MOST_LEASES = 2
NO = "the suite says no to this one"
# Its four orders have every call after most others, and open the backend again no more than twice.
SEED = 128


class Held:
    """A lease, entered and left by one task of its own."""

    def __init__(self, backend: Backend, model: Any, step: int) -> None:
        self._let_go = asyncio.Event()
        self._entered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(backend, model, step))

    async def name(self) -> str:
        """The name that it holds, once it does. Raises what kept it from it."""
        either: set[asyncio.Future[Any]] = {self._entered, self._task}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()
        return self._entered.result()

    async def let_go(self) -> None:
        """End it."""
        self._let_go.set()
        await self._task

    async def _hold(self, backend: Backend, model: Any, step: int) -> None:
        async with backend.lease(model, step) as name:
            self._entered.set_result(name)
            await self._let_go.wait()


@dataclass
class Workplace:
    """A backend in a folder, opened again and again, and the loop that it lives on."""

    loop: asyncio.AbstractEventLoop
    open_backend: OpenBackend
    folder: Path
    new_agent: NewAgent
    backend: Backend
    base_model: Path

    def run(self, work: Awaitable[T]) -> T:
        """What `work` gives or raises on the loop. Call it on another thread."""

        async def limited() -> T:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                return await work

        return asyncio.run_coroutine_threadsafe(limited(), self.loop).result()

    async def reopen(self) -> None:
        """Close the backend and open it on the same folder."""
        await self.backend.close()
        self.backend = self.open_backend(self.folder)


class BackendMachine(RuleBasedStateMachine):
    """One model. `steps` may be kept, `gone` can't be asked for, `leases` are held; the plain name answers from
    `served`.
    """

    def __init__(self, place: Workplace) -> None:
        super().__init__()
        self.place = place
        self.agent: Agent = place.run(place.new_agent(backend=place.backend))
        self.steps, self.gone, self.served = [0], set[int](), 0
        self.leases: dict[int, Held] = {}
        self.groups: list[TrajectoryGroup] = place.run(self.agent.groups())
        self.reopened = False
        self._publishes()

    def can(self, capability: Cap) -> bool:
        """Whether the backend declares it."""
        return capability in self.place.backend.capabilities

    @property
    def used(self) -> set[int]:
        """The steps that nobody may take away."""
        return {self.served, *self.leases}

    @rule()
    def register_again(self) -> None:
        registration = self.place.run(self.place.backend.register(self.agent.model))
        self.agent = replace(self.agent, registration=registration)

    @rule()
    def train(self) -> None:
        self._publishes()

    @rule()
    def veto(self) -> None:
        self._refused("art_before_publish_checkpoint")
        # A service may have served it before a plugin here was asked; then it is a step like any other.
        step = self.place.run(self.place.backend.get_step(self.agent.model))
        if step != self.served:
            self._is_served(step)
        else:
            self.gone.add(self.served + 1)

    @rule()
    def fail_before_training(self) -> None:
        self._refused("art_before_train")

    @precondition(lambda self: self.can(Cap.CHECKPOINTS_ON_DISK))
    @rule()
    def fail_to_publish(self) -> None:
        self.agent.heard.before_publish = lambda c: SPOILED["NaN"](c.path, self.place.base_model)
        with pytest.raises(ArtError):
            self._train()
        self.agent.heard.before_publish = None
        self.gone.add(self.served + 1)

    @precondition(lambda self: self.can(Cap.DELETE_CHECKPOINTS) and len(self.steps) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(self.steps))
        backend, model = self.place.backend, self.agent.model
        there = self.place.run(backend.list_steps(model))
        try:
            deleted = self.place.run(backend.delete_checkpoints(model, [step]))
        except CheckpointInUse:
            deleted = []
        # Whether a step in use is refused or left out, another check says.
        assert deleted == ([step] if step in there and step not in self.used else []), f"{step} of {there}: {deleted}"
        if step not in self.used:
            self.steps.remove(step)
            self.gone.add(step)

    @precondition(lambda self: self.can(Cap.LEASES) and len(self.leases) < MOST_LEASES)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(self.steps))
        if step in self.leases:
            return
        try:
            held, name = self.place.run(self._lease(step))
        except CheckpointNotFound:
            # A backend may serve only some of what it keeps.
            assert step != self.served, "the served step can't be leased"
            return
        assert name == self.agent.named(step)
        self.leases[step] = held

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        self.place.run(self.leases.pop(data.draw(st.sampled_from(sorted(self.leases)))).let_go())

    @precondition(lambda self: not self.reopened)
    @rule()
    def reopen(self) -> None:
        # Once for each model: an engine that starts again takes a while.
        self.reopened = True
        self.teardown()
        self.place.run(self.place.reopen())
        registration = self.place.run(self.place.backend.register(self.agent.model))
        self.agent = replace(self.agent, backend=self.place.backend, registration=registration)

    @invariant()
    def they_agree(self) -> None:
        self.place.run(self._agree())

    def teardown(self) -> None:
        while self.leases:
            self.place.run(self.leases.popitem()[1].let_go())

    async def _agree(self) -> None:
        backend, model = self.place.backend, self.agent.model
        assert await backend.get_step(model) == self.served
        kept = await backend.list_steps(model)
        assert self.used <= set(kept) <= set(self.steps), (
            f"kept are {kept}; in use are {sorted(self.used)}, and of {self.steps} some may be kept"
        )
        names: dict[str | None, int] = {None: self.served, **{self.agent.named(step): step for step in self.used}}
        for name, step in names.items():
            found = await self.agent.ask(name, max_tokens=2)
            assert {version_of(sample) for sample in found} == {step}, f"{name or 'the plain name'} is not step {step}"
        for step in sorted(self.gone):
            answer = await self.agent.post(self.agent.named(step), max_tokens=2)
            assert answer.status_code == 404, f"step {step} is not there, and gave HTTP {answer.status_code}"

    async def _lease(self, step: int) -> tuple[Held, str]:
        held = Held(self.place.backend, self.agent.model, step)
        return held, await held.name()

    def _train(self) -> int:
        work = self.place.backend.train(self.agent.model, self.groups, learning_rate=SMALL_RATE)
        return self.place.run(work).step

    def _publishes(self) -> None:
        self._is_served(self._train())

    def _is_served(self, step: int) -> None:
        assert step > self.served, f"step {step} came after step {self.served}"
        self.served = step
        self.steps.append(step)
        self.gone.discard(step)
        # Rollouts of a much older step are trained on with a warning.
        self.groups = self.place.run(self.agent.groups())

    def _refused(self, hook: str) -> None:
        self.agent.heard.refuse[hook] = ValueError(NO)
        with pytest.raises(Exception, match=NO):
            self._train()
        del self.agent.heard.refuse[hook]


class MachineChecks(BackendSuite):
    """The check of every order. `orders` is how many are tried, each of `order_length` calls."""

    orders: ClassVar[int] = 4
    order_length: ClassVar[int] = 20

    @check(
        "BCK-038",
        MUST,
        "In whatever order a model is trained, refused, failed, deleted, leased and reopened, exactly what follows from"
        " it is served and kept.",
        live=True,
    )
    async def test_any_order(
        self,
        open_backend: OpenBackend,
        new_agent: NewAgent,
        conformance_model: Path,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        folder, loop = tmp_path_factory.mktemp("any-order"), asyncio.get_running_loop()
        place = Workplace(loop, open_backend, folder, new_agent, open_backend(folder), conformance_model)
        try:
            await asyncio.to_thread(run_in_any_order, place, self.orders, self.order_length)
        finally:
            await place.backend.close()


def run_in_any_order(place: Workplace, orders: int, length: int) -> None:
    """Run the machine, the same each time. Raises what didn't hold, with the calls that led to it."""

    @seed(SEED)
    def machine() -> BackendMachine:
        return BackendMachine(place)

    # Nothing is shrunk: on a real backend each try takes seconds.
    bounded = settings(
        max_examples=orders,
        stateful_step_count=length,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        database=None,
        deadline=None,
    )
    made: Any = machine
    run_state_machine_as_test(made, settings=bounded)
