"""The models of a host: registered once, served at their latest checkpoint, let go when they are unregistered.

Knows models and which processes they need; how a process is started is `processes`'. Knows no HTTP; requests come in as
the objects of `wire`, progress goes out through `emit`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from art_core import ArtError, ModelKey, PluginRegistry
from art_core.atomic_files import write_json_atomically
from art_core.errors import CheckpointInUse, CheckpointNotFound, PublicationFailed
from art_engine_kit.base_shapes import linear_shapes
from art_engine_kit.checkpoint_folder import remove_unfinished
from art_engine_kit.model_folder import ModelFolder

from ..adapters.served_copies import forget_served_copies
from ..adapters.start import check_settings, save_starting_point
from ..servers.replicas import Replicas
from ..servers.training_worker import TrainingWorker
from ..wire.deployment import Deployment
from ..wire.messages import RegisterRequest
from .hosted_model import KEEP_IDLE, HostedModel
from .processes import Processes
from .sessions import Sessions

JSON = dict[str, Any]
Emit = Callable[[JSON], None]
_TIDY_EVERY_S = 0.2
_log = logging.getLogger(__name__)


class Host:
    """What one host process serves and trains. For one event loop."""

    def __init__(self, path: Path, registry: PluginRegistry, sessions: Sessions) -> None:
        self.path = path
        self.sessions = sessions
        self.models: dict[ModelKey, HostedModel] = {}
        self.processes = Processes(path, registry, self.report)
        self._registering: defaultdict[ModelKey, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()

    def report(self, sentence: str) -> None:
        """Tell the log and every client."""
        _log.warning(sentence)
        self.sessions.tell_all(sentence)

    def model(self, key: ModelKey) -> HostedModel:
        """A registered model. Raises CheckpointNotFound for one that isn't."""
        if key not in self.models:
            there = ", ".join(map(str, self.models)) or "none"
            raise CheckpointNotFound(f"{key} is not registered with this host; registered: {there}. Register it again.")
        return self.models[key]

    async def register(self, request: RegisterRequest, emit: Emit) -> HostedModel:
        """Serve a model at its latest whole checkpoint, made if there is none. A second call changes nothing."""
        async with self._registering[request.key]:
            model = self.models.get(request.key)
            if model is not None and model.server.broken is None:
                await asyncio.to_thread(check_settings, model.folder, request, model.base_shapes)
                differing = model.deployment.differs_from(request.deployment)
                if differing:
                    raise ValueError(
                        f"{model.key} is being served with another {' and another '.join(differing)}. Use another model"
                        f" name, or end this host first: art down --path {self.path}"
                    )
                model.deployment = request.deployment
                self._start_worker_early(request.deployment)
                return model
            if model is not None:
                await self._drop(model.server)
            return await self._first_registration(request, emit)

    async def unregister(self, key: ModelKey) -> None:
        """Serve a model no more; what is under way ends first, its files stay.

        Raises CheckpointInUse while a step of it is leased or being trained.
        """
        model = self.model(key)
        if model.turn.taken or model.steps.leased:
            what = "a step of it is being trained" if model.turn.taken else "a step of it is leased"
            raise CheckpointInUse(f"{key} stays registered: {what}. Wait for the step, or end the lease.")
        self._forget(model)
        self._own(self._see_off(model))

    async def _see_off(self, model: HostedModel) -> None:
        # Whoever registers it again waits until its adapters are gone: they have the same names.
        async with self._registering[model.key]:
            await model.leave()

    async def close(self) -> None:
        """Stop every server and worker."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.processes.close()

    async def _first_registration(self, request: RegisterRequest, emit: Emit) -> HostedModel:
        deployment, folder = request.deployment, ModelFolder.under(self.path, request.key)
        shapes = await asyncio.to_thread(linear_shapes, deployment.base_folder)
        for left in await asyncio.to_thread(remove_unfinished, folder.checkpoints):
            _log.info("removed %s, which a killed writer had left", left)
        await asyncio.to_thread(forget_served_copies, folder)
        for sentence in await asyncio.to_thread(save_starting_point, folder, request, shapes):
            self.report(sentence)
        # Both load the base at the same time; who asks for inference need not wait for the trainer.
        self._start_worker_early(deployment)
        server = await self.processes.replicas_for(deployment, emit)
        model = HostedModel(folder, base_shapes=shapes, deployment=deployment, server=server, report=self.report)
        stale = await server.unload_strangers(model.adapter_prefix)
        if stale:
            self.report(f"{server.engine.name}: unloaded {', '.join(stale)}, which an earlier host had left there.")
        self.models[model.key] = model
        server.add_tenant(model)
        try:
            await self._publish_last_good(model)
        except BaseException as error:
            self._forget(model)
            if server.attached and isinstance(error, PublicationFailed) and error.stage in ("load", "verify"):
                reason = f"it doesn't {error.stage} an adapter, because {error.__cause__ or error}"
                raise server.members[0].server.unusable(reason) from error
            raise
        await asyncio.to_thread(_describe, folder, request)
        self._own(self._keep_tidy(model))
        return model

    async def _publish_last_good(self, model: HostedModel) -> None:
        """Publish the latest checkpoint that was published before and still can be; those at fault are put aside.

        A later one, which nobody published yet, is for the client to publish, since its plugins have a say in it.
        """
        while True:
            last = await model.last_published()
            try:
                await model.publish(last)
                return
            except PublicationFailed as error:
                at_fault = error.stage == "check" and last.step > 0
                if not at_fault:
                    raise
                aside = await model.put_aside(last.step)
                self.report(f"{error} It is kept as {aside}, and the step before it is used.")

    async def _drop(self, server: Replicas) -> None:
        """Forget servers that are broken, and the models on them, which have to be registered again."""
        for model in [model for model in self.models.values() if model.server is server]:
            self._forget(model)
        await self.processes.drop(server)

    def _forget(self, model: HostedModel) -> None:
        del self.models[model.key]
        model.server.remove_tenant(model)
        model.gone.set()
        model.ended.set()

    def _start_worker_early(self, deployment: Deployment) -> None:
        # On a GPU that both share, the trainer loads once inference has stepped aside.
        if deployment.training_engine is not None and (deployment.settings.dedicated or not self.processes.has_gpu):
            self._own(self._start_worker(self.processes.worker_for(deployment)))

    async def _start_worker(self, worker: TrainingWorker) -> None:
        try:
            await worker.ensure_running()
        except ArtError as error:
            self.report(f"The training worker did not start; the next training step tries again. {error}")

    async def _keep_tidy(self, model: HostedModel) -> None:
        while not model.gone.is_set():
            await model.ended.wait()
            model.ended.clear()
            if model.steps.idle(keep=KEEP_IDLE) and model.server.up and model.server.gate.is_set():
                try:
                    await model.tidy()
                except ArtError as error:
                    self.report(f"old steps of {model.key} could not be unloaded: {error}")
            # Bursts of short requests need one look, not thousands.
            await asyncio.sleep(_TIDY_EVERY_S)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _describe(folder: ModelFolder, request: RegisterRequest) -> None:
    deployment = request.deployment
    write_json_atomically(
        folder.description,
        {
            "name": request.name,
            "project": request.project,
            "entity": request.entity,
            "trainable": True,
            "base_model": deployment.base_model,
            "base_folder": str(deployment.base_folder),
            "inference_engine": deployment.inference_engine,
            "training_engine": deployment.training_engine,
            "settings": deployment.settings.model_dump(mode="json"),
        },
    )
