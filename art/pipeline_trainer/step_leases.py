"""The steps that rollouts and evaluations hold: one lease of the backend for each, however many hold it.

Knows a backend's public calls and counts holders. Decides neither who holds what nor for how long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from art_core import Backend, BackendCapability

from ..model import TrainableModel


@dataclass
class _Held:
    holders: int = 0
    name: str | None = None
    lease: AsyncExitStack = field(default_factory=AsyncExitStack)
    begins: asyncio.Lock = field(default_factory=asyncio.Lock)


class StepLeases:
    """The leases of one run."""

    def __init__(self, model: TrainableModel, backend: Backend) -> None:
        self._model, self._backend = model, backend
        self._held: dict[int, _Held] = {}

    @property
    def steps(self) -> frozenset[int]:
        """The steps that somebody holds."""
        return frozenset(self._held)

    @asynccontextmanager
    async def hold(self, step: int) -> AsyncIterator[str]:
        """Hold a step and give the name that it is served under. The last who lets go ends its lease.

        Raises what the backend's lease raises.
        """
        held = self._held.setdefault(step, _Held())
        held.holders += 1
        try:
            async with held.begins:
                if held.name is None:
                    held.name = await self._begin(held.lease, step)
            yield held.name
        finally:
            held.holders -= 1
            if not held.holders:
                del self._held[step]
                await held.lease.aclose()

    async def _begin(self, lease: AsyncExitStack, step: int) -> str:
        if BackendCapability.LEASES not in self._backend.capabilities_for(self._model):
            return self._backend.inference_name(self._model, step)
        return await lease.enter_async_context(self._backend.lease(self._model, step))
