"""The training worker: an HTTP server on the loopback interface around one trainer.

`python -m art_training.worker --policy module:attr --base-model FOLDER --port N` loads the base once and takes one
job at a time; the wire is `art_core.training_jobs`. The token comes in the environment, never in argv. Knows HTTP and
threads; what a job does is the trainer's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import importlib
import json
import logging
import os
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from art_core.training_jobs import WORKER_TOKEN, JobFailed, TrainEvent, TrainJob

from .allocator import keep_freed_memory
from .policy import Policy, PolicyFactory, PolicyRequest
from .trainer import JobCancelled, Trainer

_log = logging.getLogger("art_training.worker")

_T = TypeVar("_T")
_DISCONNECT_POLL_S = 0.5
_TRACEBACK_CHARACTERS = 6000


class JobRunner(Protocol):
    """What the server runs jobs with; `Trainer` is the one."""

    def run(self, job: TrainJob, cancelled: Callable[[], bool]) -> Iterator[TrainEvent]:
        """Yield the job's events; raise when it fails."""


class Worker:
    """The server's state: loading, failed to load, idle, or at a job."""

    def __init__(self, load: Callable[[], JobRunner], token: str | None) -> None:
        self._load = load
        self._token = token
        self._runner: JobRunner | None = None
        self._load_error: str | None = None
        self._busy = False
        self.failed = asyncio.Event()

    def app(self) -> Starlette:
        """The ASGI application. The base model is loaded in a thread once it starts."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            loading = asyncio.create_task(self._load_runner())
            yield
            loading.cancel()

        routes = [Route("/health", self._health), Route("/jobs", self._jobs, methods=["POST"])]
        return Starlette(routes=routes, lifespan=lifespan)

    async def _load_runner(self) -> None:
        try:
            self._runner = await _in_daemon_thread(self._load)
        except Exception as error:
            _log.exception("the base model could not be loaded")
            self._load_error = f"{type(error).__name__}: {error}"
            self.failed.set()

    async def _health(self, _: Request) -> Response:
        if self._load_error is not None:
            return JSONResponse({"status": "failed", "error": self._load_error}, 500)
        if self._runner is None:
            return JSONResponse({"status": "loading"}, 503)
        return JSONResponse({"status": "training" if self._busy else "idle"})

    async def _jobs(self, request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if self._token and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            return JSONResponse({"error": "the bearer token is missing or wrong"}, 401)
        if self._runner is None:
            return JSONResponse({"error": self._load_error or "the base model is still loading; ask /health"}, 503)
        try:
            job = TrainJob.model_validate_json(await request.body())
        except ValidationError as error:
            return JSONResponse({"error": f"this is not a job: {error}"}, 422)
        if self._busy:
            return JSONResponse({"error": "a job is running; a worker takes one at a time"}, 409)
        self._busy = True
        return StreamingResponse(self._events(request, self._runner, job), media_type="application/x-ndjson")

    async def _events(self, request: Request, runner: JobRunner, job: TrainJob) -> AsyncIterator[str]:
        """One line an event. When the client is gone the job is told, and the worker is free once it has stopped."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[TrainEvent | None] = asyncio.Queue()
        gone = threading.Event()

        def work() -> None:
            try:
                for event in runner.run(job, gone.is_set):
                    loop.call_soon_threadsafe(queue.put_nowait, event)
            except JobCancelled as error:
                _log.warning("step %d of %s: %s", job.step, job.model, error)
            except Exception as error:
                _log.exception("step %d of %s failed", job.step, job.model)
                trace = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
                failed = JobFailed(error_type=type(error).__name__, message=str(error), traceback=trace)
                loop.call_soon_threadsafe(queue.put_nowait, failed)
            finally:
                loop.call_soon_threadsafe(self._finished)
                loop.call_soon_threadsafe(queue.put_nowait, None)

        threading.Thread(target=work, name=f"job-{job.step}", daemon=True).start()
        try:
            while True:
                try:
                    event = await asyncio.wait_for(queue.get(), _DISCONNECT_POLL_S)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if event is None:
                    return
                yield event.model_dump_json() + "\n"
        finally:
            gone.set()

    def _finished(self) -> None:
        self._busy = False


async def _in_daemon_thread(function: Callable[[], _T]) -> _T:
    """Run a blocking function without holding up the process's end, as the loop's own executor would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(action: Callable[[], None]) -> None:
        if not future.done():
            action()

    def work() -> None:
        try:
            result = function()
        except Exception as error:
            loop.call_soon_threadsafe(settle, lambda error=error: future.set_exception(error))
        else:
            loop.call_soon_threadsafe(settle, lambda: future.set_result(result))

    threading.Thread(target=work, daemon=True).start()
    return await future


def _load_trainer(factory: str, request: PolicyRequest) -> Trainer:
    module, _, attribute = factory.partition(":")
    make: PolicyFactory = getattr(importlib.import_module(module), attribute)
    policy: Policy = make(request)
    return Trainer(policy)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m art_training.worker", description="Run a training worker.")
    parser.add_argument("--policy", required=True, metavar="MODULE:ATTR", help="factory of the policy to train")
    parser.add_argument("--base-model", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0, ...")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--gradient-checkpointing", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--max-seq-length", default=32768, type=int)
    parser.add_argument("--init-args", default="{}", type=json.loads, metavar="JSON", help="the engine's own arguments")
    return parser.parse_args(argv)


async def _serve(arguments: argparse.Namespace) -> int:
    request = PolicyRequest(
        base_model=arguments.base_model,
        device=arguments.device,
        dtype=arguments.dtype,
        gradient_checkpointing={"auto": None, "on": True, "off": False}[arguments.gradient_checkpointing],
        max_seq_length=arguments.max_seq_length,
        init_args=arguments.init_args,
    )
    token = os.environ.pop(WORKER_TOKEN, None)
    worker = Worker(lambda: _load_trainer(arguments.policy, request), token)
    config = uvicorn.Config(
        worker.app(), host=arguments.host, port=arguments.port, log_level="warning", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    failed = asyncio.create_task(worker.failed.wait())
    await asyncio.wait({serving, failed}, return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        # Long enough for whoever polls /health to read the reason; the log has it too.
        await asyncio.sleep(1.0)
        server.should_exit = True
    failed.cancel()
    await serving
    return 1 if worker.failed.is_set() else 0


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop. Exit status 1 when the base model could not be loaded."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    keep_freed_memory()
    return asyncio.run(_serve(_arguments(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
