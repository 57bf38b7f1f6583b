"""Everything a host has: inference engines, training workers and the models they serve and train.

Starts what a registration needs and shares it among models with the same base and settings. Knows no HTTP; requests
come in as the objects of `wire`, progress goes out through `emit`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from art_core import ArtError, InferenceEngine, ModelKey, PluginRegistry, TrainingEngine
from art_core.atomic_files import write_atomically, write_json_atomically
from art_core.errors import CheckpointNotFound, PluginNotInstalled, PublicationFailed
from art_engine_kit.base_shapes import linear_shapes
from art_engine_kit.checkpoint_folder import remove_unfinished
from art_runtime import StartProgress, accelerators
from art_runtime.environments import engine_for

from ..adapters.served_copies import forget_served_copies
from ..adapters.start import check_settings, save_starting_point
from ..servers.attached_server import AttachedServer
from ..servers.devices import cores_of_replicas, devices_of, devices_of_replicas
from ..servers.inference_server import InferenceServer, ServerConfig, StartedServer
from ..servers.replicas import Replicas
from ..servers.training_server import TrainingServer, TrainingServerConfig
from ..wire.messages import RegisterRequest
from .hosted_model import HostedModel
from .sessions import Sessions

JSON = dict[str, Any]
Emit = Callable[[JSON], None]
MODEL_FILE = "model.json"
_log = logging.getLogger(__name__)


class HostState:
    """The state of one host process. For one event loop."""

    def __init__(self, path: Path, registry: PluginRegistry, sessions: Sessions) -> None:
        self.path = path
        self.registry = registry
        self.sessions = sessions
        self.models: dict[ModelKey, HostedModel] = {}
        self.requests: dict[ModelKey, RegisterRequest] = {}
        self.servers: dict[str, Replicas] = {}
        self.workers: dict[str, TrainingServer] = {}
        self.has_gpu = bool(accelerators())
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[Any]] = set()

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
        async with self._locks[f"model {request.key}"]:
            model = self.models.get(request.key)
            if model is not None and model.server.broken is None:
                await asyncio.to_thread(check_settings, model.folder, request, model.base_shapes)
                self._check_same(self.requests[request.key], request)
                model.take_settings(request.settings)
                self.requests[request.key] = request
                self._start_worker_early(request)
                return model
            if model is not None:
                await self._drop_server(model.server)
            model = await self._first_registration(request, emit)
            self.requests[request.key] = request
            return model

    def worker_for(self, request: RegisterRequest) -> TrainingServer:
        """The training worker for a model; it may not run yet. Raises PluginNotInstalled when nothing trains."""
        if request.training_engine is None:
            raise PluginNotInstalled(
                "No training engine is installed, so this backend serves models but cannot train them. To train:"
                f" {self.registry.to_install('training engine')}, and register the model again."
            )
        settings = request.settings
        key = _key(
            "train", request.training_engine, request.training_python, request.base_folder, settings.training_key()
        )
        worker = self.workers.get(key)
        if worker is None:
            engine: TrainingEngine = engine_for(self.registry.training_engine(request.training_engine))
            config = TrainingServerConfig(
                base_model=request.base_folder,
                python=request.training_python,
                log_file=self._log_file(f"training-{engine.name}-{request.base_folder.name}"),
                dtype=settings.training_dtype,
                devices=devices_of(settings.trainer_gpu_ids, accelerators()),
                max_seq_length=settings.adapter.max_seq_length,
                init_args=settings.init_args,
            )
            worker = self.workers[key] = TrainingServer(engine, config)
        return worker

    async def close(self) -> None:
        """Stop every engine and worker."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        stops = [*(s.close() for s in self.servers.values()), *(w.close() for w in self.workers.values())]
        for problem in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(problem, BaseException):
                _log.error("a process could not be stopped", exc_info=problem)

    async def _first_registration(self, request: RegisterRequest, emit: Emit) -> HostedModel:
        key = request.key
        folder = key.folder(self.path)
        shapes = await asyncio.to_thread(linear_shapes, request.base_folder)
        for left in await asyncio.to_thread(remove_unfinished, folder / "checkpoints"):
            _log.info("removed %s, which a killed writer had left", left)
        await asyncio.to_thread(forget_served_copies, folder)
        for sentence in await asyncio.to_thread(save_starting_point, folder, request, shapes):
            self.report(sentence)
        # Both load the base at the same time; who asks for inference need not wait for the trainer.
        self._start_worker_early(request)
        server = await self._server_for(request, emit)
        model = HostedModel(
            key, folder, base_shapes=shapes, settings=request.settings, server=server, report=self.report
        )
        stale = await server.unload_strangers(model.adapter_prefix)
        if stale:
            self.report(f"{server.engine.name}: unloaded {', '.join(stale)}, which an earlier host had left there.")
        self.models[key] = model
        try:
            await self._publish_last_good(model)
        except BaseException as error:
            del self.models[key]
            if server.attached and isinstance(error, PublicationFailed) and error.stage in ("load", "verify"):
                reason = f"it doesn't {error.stage} an adapter, because {error.__cause__ or error}"
                raise server.members[0].server.unusable(reason) from error
            raise
        await asyncio.to_thread(_write_model_file, folder, request)
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

    async def _server_for(self, request: RegisterRequest, emit: Emit) -> Replicas:
        settings = request.settings
        key = _key(
            "infer",
            request.inference_engine,
            request.inference_python,
            request.base_folder,
            settings.inference_key(),
            request.max_adapters,
            request.replicas,
            request.inference_urls,
        )
        async with self._locks[key]:
            server = self.servers.get(key)
            if server is not None and server.broken is None:
                await server.ready(300.0)
                return server
            engine: InferenceEngine = engine_for(self.registry.inference_engine(request.inference_engine))
            new = Replicas(
                engine,
                self._attached(request, engine) if request.inference_urls else await self._own_servers(request, engine),
                base_model=request.base_folder,
                max_adapters=request.max_adapters,
                max_lora_rank=settings.max_lora_rank,
                attached=bool(request.inference_urls),
                report=self.report,
            )
            new.serves(_ModelsOn(self, new))
            await new.start(lambda progress: emit(status_event(progress)))
            self.servers[key] = new
            return new

    def _attached(self, request: RegisterRequest, engine: InferenceEngine) -> list[InferenceServer]:
        how_to_start = self.registry.inference_engine(request.inference_engine).own_server
        key = request.inference_api_key
        return [
            AttachedServer(engine, url, key, base_model=request.base_model, how_to_start=how_to_start)
            for url in request.inference_urls
        ]

    async def _own_servers(self, request: RegisterRequest, engine: InferenceEngine) -> list[InferenceServer]:
        settings = request.settings
        template = await asyncio.to_thread(self._template_file, settings.adapter.chat_template)
        devices = devices_of_replicas(settings.inference_gpu_ids, request.replicas, accelerators())
        cores = [()] * request.replicas if self.has_gpu else cores_of_replicas(request.replicas)
        servers: list[InferenceServer] = []
        for number in range(1, request.replicas + 1):
            suffix = f"-{number}" if request.replicas > 1 else ""
            config = ServerConfig(
                base_model=request.base_folder,
                served_name="base",
                python=request.inference_python,
                log_file=self._log_file(f"inference-{engine.name}-{request.base_folder.name}{suffix}"),
                max_adapters=request.max_adapters,
                max_lora_rank=settings.max_lora_rank,
                max_model_len=settings.max_model_len,
                dtype=settings.inference_dtype,
                devices=devices[number - 1],
                cores=cores[number - 1],
                chat_template=template,
                engine_args=settings.engine_args,
            )
            title = f"inference engine {engine.name}" + (f" ({number} of {request.replicas})" if suffix else "")
            servers.append(StartedServer(engine, config, title=title, report=self.report))
        return servers

    def models_of(self, server: Replicas) -> list[HostedModel]:
        return [model for model in self.models.values() if model.server is server]

    async def _drop_server(self, server: Replicas) -> None:
        for key in [model.key for model in self.models_of(server)]:
            del self.models[key]
        self.servers = {key: s for key, s in self.servers.items() if s is not server}
        await server.close()

    def _start_worker_early(self, request: RegisterRequest) -> None:
        # On a GPU that both share, the trainer loads once inference has stepped aside.
        if request.training_engine is not None and (request.settings.dedicated or not self.has_gpu):
            self._own(self._start_worker(self.worker_for(request)))

    async def _start_worker(self, worker: TrainingServer) -> None:
        try:
            await worker.ensure_running()
        except ArtError as error:
            self.report(f"The training worker did not start; the next training step tries again. {error}")

    async def _keep_tidy(self, model: HostedModel) -> None:
        while True:
            await model.ended.wait()
            model.ended.clear()
            if model.steps.idle(keep=2) and model.server.up and model.server.gate.is_set():
                try:
                    await model.tidy()
                except ArtError as error:
                    self.report(f"old steps of {model.key} could not be unloaded: {error}")
            # Bursts of short requests need one look, not thousands.
            await asyncio.sleep(0.2)

    def _own(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_same(self, old: RegisterRequest, new: RegisterRequest) -> None:
        differing = [
            what
            for what, a, b in (
                ("base model", old.base_folder, new.base_folder),
                ("inference engine", old.inference_engine, new.inference_engine),
                ("interpreter for inference", old.inference_python, new.inference_python),
                ("inference settings", old.settings.inference_key(), new.settings.inference_key()),
                ("max_adapters", old.max_adapters, new.max_adapters),
                ("number of replicas", old.replicas, new.replicas),
                ("inference_url", old.inference_urls, new.inference_urls),
            )
            if a != b
        ]
        if differing:
            raise ValueError(
                f"{new.key} is being served with another {' and another '.join(differing)}. Use another model name, or"
                f" end this host first: art down --path {self.path}"
            )

    def _log_file(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def _template_file(self, template: str | None) -> Path | None:
        if template is None:
            return None
        file = self.path / "templates" / f"{hashlib.sha256(template.encode()).hexdigest()[:16]}.jinja"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, template.encode())
        return file


class _ModelsOn:
    """The models served by some replicas, as their `Tenants`."""

    def __init__(self, state: HostState, server: Replicas) -> None:
        self._state, self._server = state, server

    def lost(self) -> set[str]:
        return {adapter for model in self._state.models_of(self._server) for adapter in model.lost()}

    def restored(self, adapter: str) -> None:
        for model, step in self._owners(adapter):
            model.steps.add(step)

    def can_spare(self, adapter: str) -> bool:
        return all(step != model.steps.routed for model, step in self._owners(adapter))

    async def give_up_one(self) -> bool:
        for model in self._state.models_of(self._server):
            for step in model.steps.idle():
                await model.give_up(step)
                return True
        return False

    def _owners(self, adapter: str) -> list[tuple[HostedModel, int]]:
        models = self._state.models_of(self._server)
        return [(model, step) for model in models if (step := model.step_of(adapter)) is not None]


def _key(*parts: object) -> str:
    return "\n".join(map(str, parts))


def status_event(progress: StartProgress) -> JSON:
    """What the client shows while a process starts."""
    started = progress.last_line.startswith("--- ")
    return {
        "event": "status",
        "waiting_for": progress.name,
        "seconds": round(progress.seconds, 1),
        "last_line": "" if started else progress.last_line[-500:],
    }


def _write_model_file(folder: Path, request: RegisterRequest) -> None:
    write_json_atomically(
        folder / MODEL_FILE,
        {
            "name": request.name,
            "project": request.project,
            "entity": request.entity,
            "trainable": True,
            "base_model": request.base_model,
            "base_folder": str(request.base_folder),
            "inference_engine": request.inference_engine,
            "training_engine": request.training_engine,
            "settings": request.settings.model_dump(mode="json"),
        },
    )
