"""Everything that the addresses of the server share, made and closed in one place. Knows no address and no HTTP."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

from art_core import Backend, PluginRegistry
from art_core.atomic_files import write_atomically

from .base_models import BaseModels
from .catalogue import Catalogue
from .checkpoint_exports import CheckpointExports
from .database import open_database
from .hosted_backend import HostedBackend
from .in_threads import Transactions
from .job_payload import JobPayload
from .job_queue import release_leases, unfinished_payloads
from .kept_files import KeptFiles
from .large_bodies import LargeBodies
from .news import News
from .request_bodies import BodyLimits
from .step_hooks import StepHooks
from .training_worker import TrainingWorker

_STEP_HOOKS = "art-serve-step-hooks"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one entity may ask of the server. `poll_s` is how long a poll that has nothing to tell is held."""

    bodies: BodyLimits = field(default_factory=BodyLimits)
    waiting_jobs: int = 64
    requests_per_s: float = 500.0
    requests_at_once: float = 2000.0
    uploads_at_once: int = 16
    register_s: float = 50.0
    poll_s: float = 1.0
    upload_age_s: float = 7 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server's parts."""

    transactions: Transactions
    catalogue: Catalogue
    backend: HostedBackend
    worker: TrainingWorker
    files: KeptFiles
    bodies: LargeBodies
    exports: CheckpointExports
    news: News
    registry: PluginRegistry
    base_models: BaseModels
    limits: Limits
    # Requests under the same idempotency key, one after the other.
    turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = field(default_factory=WeakValueDictionary)


@asynccontextmanager
async def open_service(
    backend: Backend,
    registry: PluginRegistry,
    *,
    data: Path,
    database: str | Path,
    base_models: BaseModels,
    limits: Limits,
) -> AsyncIterator[Service]:
    """Open the database and take up what an earlier process left. The caller holds the lock of `data`, runs the worker
    and closes the backend.
    """
    engine = await asyncio.to_thread(open_database, database)
    async with Transactions(engine) as transactions:
        server_id = await asyncio.to_thread(_server_id, data)
        # Whoever holds the folder's lock knows that every other worker of this folder is dead.
        await transactions(release_leases, f"{server_id}:")
        files = await asyncio.to_thread(KeptFiles, data)
        payloads = [JobPayload.model_validate_json(text) for text in await transactions(unfinished_payloads)]
        needed = {payload.file for payload in payloads if payload.file is not None}
        await asyncio.to_thread(files.sweep, needed=needed, upload_age_s=limits.upload_age_s)
        catalogue, news = await Catalogue.read(transactions), News()
        hosted = HostedBackend(backend, transactions, catalogue, base_models, files=data / "backend")
        worker = TrainingWorker(
            f"{server_id}:{uuid.uuid4().hex}",
            backend=hosted,
            catalogue=catalogue,
            transactions=transactions,
            files=files,
            news=news,
        )
        registry.register(StepHooks(worker), _STEP_HOOKS)
        try:
            yield Service(
                transactions=transactions,
                catalogue=catalogue,
                backend=hosted,
                worker=worker,
                files=files,
                bodies=LargeBodies(files, limits.bodies, at_once=limits.uploads_at_once),
                exports=CheckpointExports(hosted, data / "exports"),
                news=news,
                registry=registry,
                base_models=base_models,
                limits=limits,
            )
        finally:
            registry.unregister(_STEP_HOOKS)
            await hosted.close()


def _server_id(data: Path) -> str:
    """The name of this folder's server, made once."""
    file = data / "server_id"
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex[:16].encode())
    return file.read_text(encoding="utf-8").strip()
