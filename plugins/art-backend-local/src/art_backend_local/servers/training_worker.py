"""One training worker's process: started when it is needed, given jobs, and its events passed on.

A worker that died is started again at the next job. Knows the wire of `art_engine_kit.training_wire`; knows no
checkpoints, routes or clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
from pydantic import ValidationError

from art_core import LaunchPlan, TrainingEngine, TrainingLaunch
from art_core.errors import ProcessFailed, TrainingFailed
from art_engine_kit.event_stream import EventLines, LineTooLong
from art_engine_kit.training_wire import JobEnded, JobFailed, TrainEvent, TrainJob, read_event
from art_runtime import StartProgress, SupervisedProcess

from ..wire.errors import error_from_json
from . import standstill
from .launching import start_server

# One packed row of a large model may take long; a worker that is there but tells of nothing for longer hangs.
SILENCE_LIMIT_S = 1800.0
# A cancelled job leaves between two rows.
BUSY_LIMIT_S = 600.0
KILL_LIMIT_S = 30.0


class TrainingWorker:
    """A training worker, started as `launch` says but for its port and token. For one event loop."""

    def __init__(self, engine: TrainingEngine, launch: TrainingLaunch, *, log_file: Path) -> None:
        self.engine = engine
        self._launch = launch
        self._log_file = log_file
        self.turn = asyncio.Lock()
        self._starting = asyncio.Lock()
        self._process: SupervisedProcess | None = None
        self._token = ""
        self._closed = False
        self._leaving: asyncio.Task[None] | None = None
        self._stood_still: SupervisedProcess | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None while none runs."""
        return self._process.pid if self._process is not None and self._process.running else None

    @property
    def state(self) -> str:
        """One word for `art ps`."""
        return "up" if self.pid is not None else "starting" if self._starting.locked() else "not running"

    async def ensure_running(self, on_progress: Callable[[StartProgress], None] | None = None) -> None:
        """Start the worker unless it runs. Raises ProcessFailed with the end of its log."""
        async with self._starting:
            if self.pid is not None:
                return
            if self._closed:
                raise ProcessFailed("the training worker is being stopped, since its host ends.")
            self._token = secrets.token_urlsafe(24)
            self._process = await start_server(
                self._plan,
                name=f"training worker {self.engine.name}",
                log_file=self._log_file,
                on_progress=on_progress,
            )

    async def run(self, job: TrainJob) -> AsyncGenerator[TrainEvent]:
        """The job's events, up to and with `JobEnded`. Closing the iterator cancels the job.

        Raises TrainingFailed when the worker dies, stands still, falls silent or answers nonsense, with the end of its
        log; and the job's own error, as the type that it was raised as, when the job fails.
        """
        process = self._process
        if process is None:
            raise ProcessFailed("the training worker was not started.")
        ended = False
        still = asyncio.create_task(self._end_when_still(process), name="watch the training worker")
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        url, body = f"{process.base_url}/jobs", job.model_dump_json()
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                http.post(url, data=body, headers=headers) as response,
            ):
                if response.status != 200:
                    reason = (await response.text())[:2000]
                    raise TrainingFailed(f"the training worker refused the job: HTTP {response.status}: {reason}")
                lines = EventLines(response.content.iter_any())
                while (event := await _next(lines)) is not None:
                    ended = isinstance(event, JobFailed | JobEnded)
                    if isinstance(event, JobFailed):
                        raise _job_error(event)
                    yield event
                    if ended:
                        return
        except TimeoutError:
            await _end(process)
            raise TrainingFailed(
                f"the training worker said nothing for {SILENCE_LIMIT_S:g} s and was ended; the next step starts a new"
                f" one. The end of its log:\n{process.log_tail()}"
            ) from None
        except (ValidationError, LineTooLong) as error:
            raise TrainingFailed(
                f"the training worker said what is no event of a job, and the step was given up: {error}. Nothing of it"
                f" was kept; the step before is still served. The end of its log:\n{process.log_tail()}"
            ) from error
        except aiohttp.ClientError as error:
            raise await self._died(process, error) from error
        finally:
            still.cancel()
            if not ended and process.running:
                self._leaving = asyncio.create_task(self._until_idle(process), name="wait for the cancelled job")
        raise await self._died(process, "its answer ended early")

    async def settled(self) -> None:
        """Wait until a cancelled job has left the worker, so that it can save nothing any more."""
        if self._leaving is not None:
            await asyncio.shield(self._leaving)

    def log_tail(self) -> str:
        """The last lines of its log."""
        return self._process.log_tail() if self._process is not None else "(it was not started)"

    async def close(self) -> None:
        """Stop the worker. A second call does nothing."""
        self._closed = True
        async with self._starting:
            if self._process is not None:
                await self._process.stop()

    def _plan(self, port: int) -> LaunchPlan:
        return self.engine.launch(replace(self._launch, port=port, token=self._token))

    async def _until_idle(self, process: SupervisedProcess) -> None:
        timeout = aiohttp.ClientTimeout(total=10)
        clock = asyncio.get_running_loop().time
        deadline, answered = clock() + BUSY_LIMIT_S, clock()
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while process.running:
                # A worker that doesn't answer is dead, which `running` tells, or too busy.
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with http.get(f"{process.base_url}/health") as response:
                        answered = clock()
                        if response.status == 200 and (await response.json()).get("status") != "training":
                            return
                if clock() > deadline or clock() - answered > standstill.limit_s():
                    await _end(process)
                    return
                await asyncio.sleep(0.1)

    async def _end_when_still(self, process: SupervisedProcess) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=standstill.TIMEOUT_S)) as http:

            async def answers() -> bool:
                try:
                    async with http.get(f"{process.base_url}/health") as response:
                        return response.status == 200
                except (aiohttp.ClientError, TimeoutError):
                    return False

            await standstill.stands_still(answers)
        self._stood_still = process
        process.kill()

    async def _died(self, process: SupervisedProcess, cause: object) -> TrainingFailed:
        try:
            exit_ = await asyncio.wait_for(process.wait_exit(), 5.0)
        except TimeoutError:
            await _end(process)
            how = f"broke its connection ({cause}) and was ended"
        else:
            how = exit_.cause
        if self._stood_still is process:
            how = f"ran, but had not answered its health check for {standstill.limit_s():g} s, and was ended"
        return TrainingFailed(
            f"the training worker {how} in the middle of the step. Nothing of it was kept; the step before is still"
            " served, and the next step starts a new worker. The end of its log"
            f" ({process.log_file}):\n{process.log_tail()}"
        )


async def _end(process: SupervisedProcess) -> None:
    """Kill it, and wait until it has gone: the next job is not for one that is dying."""
    process.kill()
    # One that a driver holds on to for longer is nobody's to wait for.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait_exit(), KILL_LIMIT_S)


async def _next(lines: EventLines) -> TrainEvent | None:
    """The next event, None at the end. A worker that only says that it is there says nothing."""
    async with asyncio.timeout(SILENCE_LIMIT_S):
        line = await anext(lines, None)
    return None if line is None else read_event(line)


def _job_error(event: JobFailed) -> Exception:
    error = error_from_json({"types": [event.error_type], "message": event.message})
    if type(error).__name__ == event.error_type:
        return error
    return TrainingFailed(
        f"the step failed in the training worker: {event.error_type}: {event.message}. Nothing of it was kept; the step"
        f" before is still served.\n{event.traceback}"
    )
