"""The training worker's HTTP: health, and one job at a time as a stream of events, cancelled when its client goes away.

The wire is `art_engine_kit.training_wire`. Knows HTTP and threads; what a job does is the trainer's, and how the
process starts is `worker`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from art_engine_kit.event_stream import Emit, EventStream, has_key
from art_engine_kit.training_wire import JobEnded, JobFailed, TrainEvent, TrainJob

from .cancellation import JobCancelled

_log = logging.getLogger("art_training_kit.worker")

_T = TypeVar("_T")
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

    async def _jobs(self, request: Request) -> ASGIApp:
        if self._token and not has_key(request.scope, self._token):
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
        return EventStream(partial(self._run, self._runner, job))

    async def _run(self, runner: JobRunner, job: TrainJob, emit: Emit) -> None:
        """Run the job in a thread. One whose client is gone is told, and the worker is free once it has stopped."""
        loop = asyncio.get_running_loop()
        gone = threading.Event()

        def tell(event: TrainEvent) -> None:
            loop.call_soon_threadsafe(emit, event.model_dump_json())

        def work() -> None:
            last: TrainEvent | None = None
            try:
                for event in runner.run(job, gone.is_set):
                    if isinstance(event, JobEnded):
                        last = event
                    else:
                        tell(event)
            except JobCancelled as error:
                _log.warning("step %d of %s: %s", job.step, job.model, error)
            except Exception as error:
                _log.exception("step %d of %s failed", job.step, job.model)
                trace = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
                last = JobFailed(error_type=type(error).__name__, message=str(error), traceback=trace)
            finally:
                loop.call_soon_threadsafe(self._finished)
            if last is not None:
                # Whoever hears of the end may send the next job.
                tell(last)

        try:
            await _in_daemon_thread(work)
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
