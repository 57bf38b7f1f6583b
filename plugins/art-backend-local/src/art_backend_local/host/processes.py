"""The inference servers and training workers of a host, by what they serve and train: started once, shared by models.

Knows deployments; knows no model, no client and no HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from art_core import InferenceEngine, InferenceLaunch, PluginRegistry, TrainingEngine, TrainingLaunch
from art_core.atomic_files import write_atomically
from art_core.errors import PluginNotInstalled
from art_runtime import StartProgress, accelerators
from art_runtime.environments import engine_for

from ..servers.attached_server import AttachedServer
from ..servers.devices import cores_of_replicas, devices_of, devices_of_replicas
from ..servers.inference_server import InferenceServer, StartedServer
from ..servers.replicas import Replicas
from ..servers.training_worker import TrainingWorker
from ..wire.deployment import Deployment

JSON = dict[str, Any]
Emit = Callable[[JSON], None]
# Another model's registration is starting the very servers.
SHARED_START_LIMIT_S = 300.0
_LOOPBACK = "127.0.0.1"
_log = logging.getLogger(__name__)


class Processes:
    """For one event loop. `report` takes a sentence for the user."""

    def __init__(self, path: Path, registry: PluginRegistry, report: Callable[[str], None]) -> None:
        self.has_gpu = bool(accelerators())
        self._path = path
        self._registry = registry
        self._report = report
        self._replicas: dict[str, Replicas] = {}
        self._workers: dict[str, TrainingWorker] = {}
        self._starting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def replicas(self) -> list[Replicas]:
        """The inference servers, those that serve the same models together."""
        return list(self._replicas.values())

    @property
    def workers(self) -> list[TrainingWorker]:
        """The training workers, running or not."""
        return list(self._workers.values())

    async def replicas_for(self, deployment: Deployment, emit: Emit) -> Replicas:
        """The servers of a deployment, started if need be. Raises ArtError saying why they can't be."""
        key = deployment.serving_key
        async with self._starting[key]:
            known = self._replicas.get(key)
            if known is not None and known.broken is None:
                await known.ready(SHARED_START_LIMIT_S)
                return known
            engine: InferenceEngine = engine_for(self._registry.inference_engine(deployment.inference_engine))
            attached = bool(deployment.inference_urls)
            new = Replicas(
                engine,
                self._attached(deployment, engine) if attached else await self._own(deployment, engine),
                base_model=deployment.base_folder,
                max_adapters=deployment.max_adapters,
                max_lora_rank=deployment.settings.max_lora_rank,
                attached=attached,
                report=self._report,
            )
            await new.start(lambda progress: emit(status_event(progress)))
            self._replicas[key] = new
            return new

    async def drop(self, replicas: Replicas) -> None:
        """Let servers go that are of no use any more."""
        self._replicas = {key: known for key, known in self._replicas.items() if known is not replicas}
        await replicas.close()

    def worker_for(self, deployment: Deployment) -> TrainingWorker:
        """The worker of a deployment; it may not run yet. Raises PluginNotInstalled when nothing trains."""
        if deployment.training_engine is None:
            raise PluginNotInstalled(
                "No training engine is installed, so this backend serves models but cannot train them. To train:"
                f" {self._registry.to_install('training engine')}, and register the model again."
            )
        worker = self._workers.get(deployment.training_key)
        if worker is None:
            engine: TrainingEngine = engine_for(self._registry.training_engine(deployment.training_engine))
            settings = deployment.settings
            launch = TrainingLaunch(
                base_model=deployment.base_folder,
                host=_LOOPBACK,
                port=0,
                token="",
                python=deployment.training_python,
                dtype=settings.training_dtype,
                devices=devices_of(settings.trainer_gpu_ids, accelerators()),
                max_seq_length=settings.adapter.max_seq_length,
                init_args=settings.init_args,
            )
            log_file = self._log_file(f"training-{engine.name}-{deployment.base_folder.name}")
            worker = self._workers[deployment.training_key] = TrainingWorker(engine, launch, log_file=log_file)
        return worker

    async def close(self) -> None:
        """Stop every server and worker."""
        stops = [*(each.close() for each in self.replicas), *(worker.close() for worker in self.workers)]
        for problem in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(problem, BaseException):
                _log.error("a process could not be stopped", exc_info=problem)

    def _attached(self, deployment: Deployment, engine: InferenceEngine) -> list[InferenceServer]:
        how_to_start = self._registry.inference_engine(deployment.inference_engine).own_server
        key, base = deployment.inference_api_key, deployment.base_model
        return [
            AttachedServer(engine, url, key, base_model=base, how_to_start=how_to_start)
            for url in deployment.inference_urls
        ]

    async def _own(self, deployment: Deployment, engine: InferenceEngine) -> list[InferenceServer]:
        settings, count = deployment.settings, deployment.replicas
        launch = InferenceLaunch(
            base_model=deployment.base_folder,
            served_name="base",
            host=_LOOPBACK,
            port=0,
            api_key="",
            python=deployment.inference_python,
            max_lora_rank=settings.max_lora_rank,
            max_adapters=deployment.max_adapters,
            max_model_len=settings.max_model_len,
            dtype=settings.inference_dtype,
            chat_template=await asyncio.to_thread(self._template_file, settings.adapter.chat_template),
            engine_args=settings.engine_args,
        )
        devices = devices_of_replicas(settings.inference_gpu_ids, count, accelerators())
        cores = [()] * count if self.has_gpu else cores_of_replicas(count)
        servers: list[InferenceServer] = []
        for number, (gpus, cpus) in enumerate(zip(devices, cores, strict=True), 1):
            name = f"inference-{engine.name}-{deployment.base_folder.name}" + (f"-{number}" if count > 1 else "")
            title = f"inference server {engine.name}" + (f" ({number} of {count})" if count > 1 else "")
            servers.append(
                StartedServer(
                    engine,
                    replace(launch, devices=gpus),
                    cores=cpus,
                    title=title,
                    log_file=self._log_file(name),
                    report=self._report,
                )
            )
        return servers

    def _log_file(self, name: str) -> Path:
        return self._path / "logs" / f"{name}.log"

    def _template_file(self, template: str | None) -> Path | None:
        if template is None:
            return None
        file = self._path / "templates" / f"{hashlib.sha256(template.encode()).hexdigest()[:16]}.jinja"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, template.encode())
        return file


def status_event(progress: StartProgress) -> JSON:
    """What the client shows while a process starts."""
    started = progress.last_line.startswith("--- ")
    return {
        "event": "status",
        "waiting_for": progress.name,
        "seconds": round(progress.seconds, 1),
        "last_line": "" if started else progress.last_line[-500:],
    }
