"""What the parts of one running pipeline share: the model and its backend, the flow, the kept state, the status.

Knows how a step is held for a rollout, and how a part waits for a change. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from art_core import Backend, TrajectoryGroup

from ..model import TrainableModel
from ..pinned_step import pinned
from .flow import Flow
from .kept_state import KeptState
from .scenario_source import ScenarioSource
from .settings import PipelineSettings
from .status import StatusReporter
from .step_leases import StepLeases


@dataclass
class Run:
    """One call of `PipelineTrainer.train`."""

    model: TrainableModel
    backend: Backend
    config: Any
    settings: PipelineSettings
    flow: Flow
    source: ScenarioSource
    kept: KeptState
    status: StatusReporter
    leases: StepLeases
    stopping: bool = False
    stop_after_step: bool = False
    aside: list[TrajectoryGroup] = field(default_factory=list)
    ready_at: dict[int, float] = field(default_factory=dict)
    rollouts: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    too_old: set[int] = field(default_factory=set)
    _waiting: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def no_more(self) -> bool:
        """True when no further scenario will begin."""
        return self.stopping or self.source.ended

    def stop(self) -> None:
        """Begin no scenario any more, and end the rollouts under way."""
        self.stopping = True
        for task in self.rollouts.values():
            task.cancel()
        self.changed()

    def changed(self) -> None:
        """Wake the parts that wait; each looks whether it may go on."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a change makes the condition true. The status names what waits, and for how long."""
        while not condition():
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)

    @asynccontextmanager
    async def leased(self, step: int, *, pin: bool) -> AsyncIterator[None]:
        """Hold a step, and with `pin` send the requests of the block to it."""
        async with self.leases.hold(step) as name:
            with pinned(self.model.inference_base_url or "", self.model.name, name) if pin else nullcontext():
                yield
