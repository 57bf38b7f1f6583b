"""The one backend behind the server: which models it serves, under which names, and that each is registered once.

Knows the Backend protocol and no backend; no HTTP, no queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from art_core import Backend, BackendCapability, Registration

from .base_models import BaseModels
from .catalogue import Catalogue
from .in_threads import Transactions
from .model_records import ModelRecord, hold_to


@dataclass(kw_only=True)
class ServedPolicy:
    """A model as the backend, and the plugins that hear of it, know it."""

    name: str
    project: str
    entity: str | None
    base_model: str
    base_path: str
    id: str
    report_metrics: list[str] | None = None
    internal_config: Mapping[str, Any] = field(default_factory=dict)
    trainable: bool = True


class HostedBackend:
    """Registers models with the backend when they are first needed, once each; who comes meanwhile waits for the same.

    What it owns it ends in `close`; the backend itself is the caller's.
    """

    def __init__(
        self,
        backend: Backend,
        transactions: Transactions,
        catalogue: Catalogue,
        base_models: BaseModels,
        *,
        files: Path,
    ) -> None:
        self.backend = backend
        self._transactions = transactions
        self._catalogue = catalogue
        self._base_models = base_models
        self._files = files
        self._policies: dict[str, ServedPolicy] = {}
        self._registering: dict[str, asyncio.Task[Registration]] = {}

    @property
    def capabilities(self) -> frozenset[BackendCapability]:
        """What the backend declares."""
        return self.backend.capabilities

    def policy(self, record: ModelRecord) -> ServedPolicy:
        """The backend's view of a model, the same one each time."""
        if record.id not in self._policies:
            self._policies[record.id] = ServedPolicy(
                name=record.name,
                project=record.backend_project,
                entity=None,
                base_model=self._base_models.resolve(record.base_model),
                base_path=str(self._files),
                id=record.id,
            )
        return self._policies[record.id]

    def is_registered(self, record: ModelRecord) -> bool:
        """Whether the model can be asked at once."""
        task = self._registering.get(record.id)
        return task is not None and task.done() and not task.cancelled() and task.exception() is None

    def registering(self, record: ModelRecord) -> asyncio.Task[Registration]:
        """The registration of a model, under way or done. One that failed is begun anew. Nobody but this object may
        cancel it.
        """
        task = self._registering.get(record.id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._register(record), name=f"register {record.id}")
            # Retrieved here, or the loop complains when whoever asked has gone.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._registering[record.id] = task
        return task

    async def registered(self, record: ModelRecord) -> Registration:
        """Where a model is served, registering it unless it is. Raises what the backend raises."""
        # One who stops waiting doesn't stop the others.
        return await asyncio.shield(self.registering(record))

    async def _register(self, record: ModelRecord) -> Registration:
        policy = self.policy(record)
        registration = await self.backend.register(policy)
        await self._transactions(hold_to, record.id, await self.backend.list_steps(policy))
        self._catalogue.published(record, await self.backend.get_step(policy))
        return registration

    async def steps(self, record: ModelRecord) -> Sequence[int]:
        """The steps that the backend keeps of a model, and the table says so too."""
        steps = await self.backend.list_steps(self.policy(record))
        await self._transactions(hold_to, record.id, steps)
        return steps

    def register_again(self, record: ModelRecord) -> None:
        """The backend went away: ask it anew next time. Those who wait for an answer under way still get it."""
        task = self._registering.get(record.id)
        if task is not None and task.done():
            del self._registering[record.id]

    def forget(self, record: ModelRecord) -> None:
        """A model that is deleted is registered no more."""
        self._policies.pop(record.id, None)
        task = self._registering.pop(record.id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """End what is being registered."""
        under_way = list(self._registering.values())
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
