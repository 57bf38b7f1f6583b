"""The worker over real HTTP: a uvicorn server on a free port, with a trainer on a small policy inside."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from art_engine_kit.event_stream import ALIVE, EventLines
from art_engine_kit.groups_file import write_groups
from art_engine_kit.train_options import TrainOptions
from art_engine_kit.training_wire import JobEnded, JobFailed, TrainEvent, TrainJob, read_event
from art_training_kit.trainer import Trainer
from art_training_kit.worker_app import Worker

Make = Callable[..., Any]
TOKEN = {"Authorization": "Bearer secret"}


@contextlib.asynccontextmanager
async def serving(worker: Worker) -> AsyncIterator[httpx.AsyncClient]:
    server = uvicorn.Server(
        uvicorn.Config(worker.app(), port=0, loop="asyncio", log_level="error", timeout_graceful_shutdown=1)
    )
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=TOKEN) as client:
        try:
            yield client
        finally:
            server.should_exit = True
            await task


async def ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.01)


def last_event(answer: httpx.Response) -> TrainEvent:
    return read_event([line for line in answer.content.splitlines() if line != ALIVE][-1])


@pytest.fixture
def body(checkpoints: Path, make_groups: Make) -> Callable[..., str]:
    def make(step: int = 1, groups: Any = None) -> str:
        file = checkpoints.parent / "groups.json"
        write_groups(file, make_groups() if groups is None else groups)
        return TrainJob(
            model="project/agent", step=step,
            start=checkpoints / f"{step - 1:04d}", destination=checkpoints / f"{step:04d}",
            groups_file=file, options=TrainOptions(learning_rate=1e-3),
        ).model_dump_json()  # fmt: skip

    return make


async def test_health_jobs_and_events(small_policy: Make, body: Make, checkpoints: Path) -> None:
    gate = threading.Event()

    def load() -> Trainer:
        gate.wait(30)
        return Trainer(small_policy())

    async with serving(Worker(load, "secret")) as client:
        assert (await client.get("/health")).status_code == 503
        assert (await client.post("/jobs", content=body())).status_code == 503
        gate.set()
        await ready(client)
        assert (await client.post("/jobs", content=body(), headers={"Authorization": "Bearer no"})).status_code == 401
        assert (await client.post("/jobs", content="{}")).status_code == 422
        for step in (1, 2):
            answer = await client.post("/jobs", content=body(step))
            assert isinstance(last_event(answer), JobEnded)
            assert (checkpoints / f"{step:04d}").is_dir()


async def test_a_failed_job_says_why_and_the_worker_goes_on(small_policy: Make, body: Make, make_groups: Make) -> None:
    bad = make_groups()
    bad[0].trajectories[1].choices()[0].token_ids[0] = 9999
    async with serving(Worker(lambda: Trainer(small_policy()), "secret")) as client:
        await ready(client)
        failed = last_event(await client.post("/jobs", content=body(groups=bad)))
        assert isinstance(failed, JobFailed)
        assert failed.error_type == "InvalidTrajectory"
        assert "trajectory_groups[0].trajectories[1]" in failed.message
        assert "tokenize" in failed.traceback
        answer = await client.post("/jobs", content=body())
        assert isinstance(last_event(answer), JobEnded)


class Slow:
    """Has something left to do after it has said that the job ended, or failed."""

    def run(self, job: TrainJob, cancelled: Callable[[], bool]) -> Iterator[TrainEvent]:
        try:
            yield JobEnded(metrics={})
            if job.step == 2:
                raise OSError("no room")
        finally:
            time.sleep(0.2)


@pytest.mark.slow
async def test_whoever_hears_of_the_end_may_send_the_next_job(body: Make) -> None:
    async with serving(Worker(Slow, "secret")) as client:
        await ready(client)
        for step, end in ((1, JobEnded), (2, JobFailed), (1, JobEnded)):
            async with client.stream("POST", "/jobs", content=body(step)) as answer:
                assert answer.status_code == 200
                assert isinstance(read_event(await anext(EventLines(answer.aiter_raw()))), end)


class Waiting(Trainer):
    """Stops before each event until it is let on, so that a test decides what happens meanwhile."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.go, self.stopped = threading.Event(), threading.Event()
        self.cancelled: Callable[[], bool] = lambda: False

    def run(self, job: TrainJob, cancelled: Callable[[], bool] = lambda: False) -> Iterator[TrainEvent]:
        self.cancelled = cancelled
        try:
            for event in super().run(job, cancelled):
                yield event
                self.go.wait(30)
        finally:
            self.stopped.set()


async def test_one_job_at_a_time_and_a_client_that_leaves_cancels_its_own(
    small_policy: Make, body: Make, checkpoints: Path
) -> None:
    waiting = Waiting(small_policy())
    async with serving(Worker(lambda: waiting, "secret")) as client:
        await ready(client)
        async with client.stream("POST", "/jobs", content=body()) as answer:
            assert read_event(await anext(EventLines(answer.aiter_raw()))).event == "started"
            assert (await client.post("/jobs", content=body())).status_code == 409
            assert (await client.get("/health")).json() == {"status": "training"}
        async with asyncio.timeout(30):
            while not waiting.cancelled():
                await asyncio.sleep(0.01)
        waiting.go.set()
        assert await asyncio.to_thread(waiting.stopped.wait, 30)
        assert [p.name for p in checkpoints.iterdir()] == ["0000"]
        async with asyncio.timeout(30):
            while (await client.get("/health")).json() != {"status": "idle"}:
                await asyncio.sleep(0.01)
        answer = await client.post("/jobs", content=body())
        assert isinstance(last_event(answer), JobEnded)


async def test_a_base_that_does_not_load_is_told_by_health() -> None:
    def load() -> Trainer:
        raise FileNotFoundError("no weights in /nowhere")

    worker = Worker(load, None)
    async with serving(worker) as client:
        await asyncio.wait_for(worker.failed.wait(), 10)
        answer = await client.get("/health")
        assert answer.status_code == 500
        assert "no weights in /nowhere" in answer.json()["error"]


def test_the_entry_point_loads_no_torch_before_its_environment_is_set() -> None:
    code = "import art_training_kit.worker, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
