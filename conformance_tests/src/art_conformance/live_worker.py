"""A live training worker for the checks: a training engine's launch plan run on this machine, and sent jobs.

Knows the wire of `art_engine_kit.training_wire` and processes, as a backend would; knows no engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from art_core import TrainingEngine, TrainingLaunch
from art_engine_kit.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, saving
from art_engine_kit.event_stream import EventLines
from art_engine_kit.training_wire import JobEnded, JobFailed, TrainEvent, TrainJob, read_event
from art_runtime import SupervisedProcess

from .tiny_model import write_adapter

JOB_LIMIT_S = 200.0


class JobRefused(Exception):
    """The worker didn't take a job; `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(f"HTTP {status}: {text}")


@dataclass
class LiveWorker:
    """A running worker."""

    engine: TrainingEngine
    launch: TrainingLaunch
    process: SupervisedProcess
    client: httpx.AsyncClient

    async def lines(self, job: TrainJob | dict[str, Any], **settings: Any) -> AsyncIterator[bytes]:
        """Send a job and give the lines of its answer as they come. Raises JobRefused when it isn't taken."""
        content = job.model_dump_json() if isinstance(job, TrainJob) else httpx.Request("POST", "/", json=job).content
        headers = {"Content-Type": "application/json", **settings.pop("headers", {})}
        async with self.client.stream(
            "POST", "/jobs", content=content, headers=headers, timeout=JOB_LIMIT_S, **settings
        ) as answer:
            if answer.status_code != 200:
                raise JobRefused(answer.status_code, (await answer.aread()).decode(errors="replace"))
            async for line in EventLines(answer.aiter_bytes()):
                yield line

    async def events(self, job: TrainJob | dict[str, Any], **settings: Any) -> AsyncIterator[TrainEvent]:
        """The same as events. One that is closed early leaves the job."""
        async with aclosing(self.lines(job, **settings)) as lines:  # type: ignore[type-var]
            async for line in lines:
                yield read_event(line)

    async def run(self, job: TrainJob) -> list[TrainEvent]:
        """Send a job and give all its events."""
        return [event async for event in self.events(job)]

    async def train(self, job: TrainJob) -> JobEnded:
        """Send a job that must work, and give its last event."""
        last = (await self.run(job))[-1]
        assert isinstance(last, JobEnded), f"the job failed: {last}"
        return last

    async def failing(self, job: TrainJob) -> JobFailed:
        """Send a job that must fail, and give its last event."""
        last = (await self.run(job))[-1]
        assert isinstance(last, JobFailed), f"the job did not fail: {last}"
        return last

    async def close(self) -> None:
        """Stop the worker and close the connections."""
        await self.client.aclose()
        await self.process.stop()


async def start_worker(engine: TrainingEngine, launch: TrainingLaunch, log_file: Path) -> LiveWorker:
    """Run a training engine's launch plan and wait until the worker is ready."""
    process = await SupervisedProcess.start(
        engine.launch(launch), port=launch.port, log_file=log_file, name=f"training worker {engine.name}"
    )
    client = httpx.AsyncClient(
        base_url=f"http://{launch.host}:{launch.port}",
        headers={"Authorization": f"Bearer {launch.token}"},
        timeout=JOB_LIMIT_S,
        trust_env=False,
    )
    return LiveWorker(engine, launch, process, client)


@asynccontextmanager
async def working(engine: TrainingEngine, launch: TrainingLaunch, log_file: Path) -> AsyncIterator[LiveWorker]:
    """Run a training worker until the block is left."""
    worker = await start_worker(engine, launch, log_file)
    try:
        yield worker
    finally:
        await worker.close()


def save_start(destination: Path, adapter: Path, *, step: int, base_model: Path) -> Path:
    """Make a whole checkpoint of an adapter folder, without optimizer state or canary, as step 0 is."""
    with saving(destination, step=step, base_model=str(base_model), engine="conformance") as folder:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            (folder / name).write_bytes((adapter / name).read_bytes())
    return destination


def seeded_start(folder: Path, base_model: Path) -> Path:
    """Make step 0 below `folder`, of an adapter that says something: the one that steps are compared from."""
    adapter = write_adapter(folder / "adapter", base_model, seed=5, strength=0.1)
    return save_start(folder / "checkpoints" / "0000", adapter, step=0, base_model=base_model)
