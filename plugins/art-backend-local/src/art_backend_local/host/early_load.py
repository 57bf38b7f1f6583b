"""An adapter brought into the servers, and asked its canary's prompts, while its checkpoint is still being written.

Nobody is served by it: it is judged as any adapter is before a server sees it, and only a publication, which holds it
against the whole checkpoint, can go on from here. Where something fails, the publication does it anew and says what.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from art_core import CheckpointRef
from art_engine_kit.adapter_files import check_adapter
from art_engine_kit.base_shapes import LinearShapes
from art_engine_kit.model_folder import ModelFolder
from art_engine_kit.training_wire import AdapterWritten

from ..adapters.fingerprint import fingerprint_of
from ..adapters.served_copies import early_copy
from ..servers.engine_connection import EngineConnection
from ..servers.replicas import Replicas, Tenant
from ..servers.verification import CanaryAnswers

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class JudgedAdapter:
    """An adapter that fits its base: where servers read it, and the fingerprint of its files."""

    folder: Path
    fingerprint: str


class EarlyLoad:
    """Judge, load and ask, each as soon as it can be done. `judged`, `loaded` and `answered` wait for it, and give
    nothing where it came to nothing.
    """

    def __init__(
        self,
        checkpoint: CheckpointRef,
        written: AdapterWritten,
        *,
        tenant: Tenant,
        server: Replicas,
        base_shapes: LinearShapes,
        folder: ModelFolder,
    ) -> None:
        self.checkpoint = checkpoint
        self._written = written
        self._tenant = tenant
        self._server = server
        self._base_shapes = base_shapes
        self._folder = folder
        self._judged = self._begin(self._judge())
        self._loaded = self._begin(self._load())
        self._answered = self._begin(self._ask())

    async def judged(self) -> JudgedAdapter | None:
        """What was found sound."""
        return await _outcome(self._judged)

    async def loaded(self) -> JudgedAdapter | None:
        """What the servers hold."""
        return await _outcome(self._loaded)

    async def answered(self) -> Mapping[EngineConnection, CanaryAnswers]:
        """What they said under its name."""
        return await _outcome(self._answered) or {}

    async def stop(self) -> None:
        """End what is under way. Whoever calls it unloads the adapter."""
        work: tuple[asyncio.Task[Any], ...] = (self._judged, self._loaded, self._answered)
        for task in work:
            task.cancel()
        await asyncio.wait(work)

    async def _judge(self) -> JudgedAdapter | None:
        return await asyncio.to_thread(self._judge_files)

    def _judge_files(self) -> JudgedAdapter | None:
        copy = early_copy(self._written.folder, self.checkpoint, self._base_shapes, self._folder)
        if copy is None:
            return None
        check_adapter(copy, self._base_shapes, max_rank=self._server.max_lora_rank)
        return JudgedAdapter(copy, fingerprint_of(copy))

    async def _load(self) -> JudgedAdapter | None:
        judged = await self.judged()
        if judged is not None:
            async with self._server.adapters_lock:
                await self._server.make_room(self._tenant)
                await self._server.load(self.checkpoint.adapter_name, judged.folder, judged.fingerprint)
        return judged

    async def _ask(self) -> Mapping[EngineConnection, CanaryAnswers]:
        if await self.loaded() is None or not self._written.prompts:
            return {}
        return await self._server.ask_canary(self.checkpoint.adapter_name, self._written.prompts)

    def _begin(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work, name=f"load {self.checkpoint.inference_name} early")
        task.add_done_callback(self._tell)
        return task

    def _tell(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.info("%s was not loaded early: %s", self.checkpoint.inference_name, error)


async def _outcome(task: asyncio.Task[_T]) -> _T | None:
    await asyncio.wait({task})
    return None if task.cancelled() or task.exception() is not None else task.result()
