"""The inference servers that a host can have: one that it starts and restarts, and one that the user runs.

Both give a connection and say when it is lost. What is loaded into them is the replicas' business.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from art_core import ArtError, InferenceEngine, InferenceLaunch, LaunchPlan
from art_core.errors import ProcessFailed
from art_runtime import StartProgress, SupervisedProcess

from . import standstill
from .engine_connection import EngineConnection
from .launching import start_server

JSON = dict[str, Any]
Report = Callable[[str], None]
OnProgress = Callable[[StartProgress], None]
# A server that dies this often within the window is broken, not unlucky.
DEATHS_ALLOWED = 5
DEATH_WINDOW_S = 600.0


class InferenceServer(Protocol):
    """One server, whoever runs it. For one event loop."""

    @property
    def title(self) -> str:
        """What it is called in a sentence, such as "inference server vllm"."""

    @property
    def pid(self) -> int | None:
        """Its process id; None while it has none that is ours."""

    async def start(self, on_progress: OnProgress | None = None) -> EngineConnection:
        """Have it there for the first time. Raises ArtError saying why it can't be."""

    async def start_again(self) -> EngineConnection:
        """Have it there again after it was lost. Raises ProcessFailed when it can't be, for now or for good."""

    async def gone(self) -> str:
        """Wait until it is lost; gives a sentence that says so and why."""

    def give_up(self) -> None:
        """Count it as lost, now: it does not do what it should."""

    def unusable(self, reason: str) -> ArtError:
        """The error that says that it can't be used at all, and what to do."""

    async def close(self) -> None:
        """Let it go. A second call does nothing."""


class BrokenServer(ProcessFailed):
    """A server that is not started again."""


class StartedServer:
    """A server process of our own, started as `launch` says but on a port of its own, with a key of its own. See
    `InferenceServer`. Its log is appended to; it keeps to the CPU `cores`, or to none in particular.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        launch: InferenceLaunch,
        *,
        cores: tuple[int, ...],
        title: str,
        log_file: Path,
        report: Report,
    ) -> None:
        self.title = title
        self._engine = engine
        self._launch = launch
        self._cores = cores
        self._log_file = log_file
        self._report = report
        # One that begins with a dash is an option to a server that is given it on a command line of its own.
        self._api_key = f"art-{secrets.token_urlsafe(24)}"
        self._process: SupervisedProcess | None = None
        self._connection: EngineConnection | None = None
        self._deaths: list[float] = []
        self._health_path = "/health"

    @property
    def pid(self) -> int | None:
        """The process id; None while none runs."""
        return self._process.pid if self._process is not None and self._process.running else None

    async def start(self, on_progress: OnProgress | None = None) -> EngineConnection:
        """Start the process. Raises ProcessFailed with the end of its log."""
        await self.close()
        process = self._process = await start_server(
            self._plan,
            name=self.title,
            log_file=self._log_file,
            cores=self._cores,
            on_progress=on_progress,
        )

        def evidence() -> str:
            return f" The end of its log:\n{process.log_tail()}"

        self._connection = EngineConnection(self._engine, process.base_url, self._api_key, evidence=evidence)
        return self._connection

    async def start_again(self) -> EngineConnection:
        """Start it anew, unless it died too often."""
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < DEATH_WINDOW_S]
        if len(self._deaths) > DEATHS_ALLOWED:
            raise BrokenServer(
                f"the {self.title} died {len(self._deaths)} times within {DEATH_WINDOW_S:g} s and is not restarted"
                " again. Mend the cause and register the model again. The end of its log:\n"
                f"{self._running().log_tail()}"
            )
        return await self.start()

    async def gone(self) -> str:
        """Wait until the process has ended. One that runs but doesn't answer its health check any more is ended."""
        process = self._running()
        still = asyncio.create_task(standstill.stands_still(self._answers), name=f"watch {self.title}")
        ending = asyncio.create_task(process.wait_exit())
        try:
            await asyncio.wait({ending, still}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                self._report(
                    f"The {self.title} runs but has not answered for {standstill.limit_s():g} s, so it is ended."
                )
                process.kill()
            exit_ = await ending
        finally:
            still.cancel()
            ending.cancel()
        self._deaths.append(time.monotonic())
        return f"The {self.title} died and is being restarted. {exit_}"

    def unusable(self, reason: str) -> ProcessFailed:
        """With the end of its log."""
        log = self._process.log_tail() if self._process is not None else "(it was not started)"
        return ProcessFailed(f"the {self.title} can't be used: {reason.rstrip('. ')}. The end of its log:\n{log}")

    def give_up(self) -> None:
        """End the process at once; `gone` tells."""
        self._running().kill()

    async def close(self) -> None:
        """Stop the process. A second call does nothing."""
        connection, self._connection = self._connection, None
        process, self._process = self._process, None
        if connection is not None:
            await connection.close()
        if process is not None:
            await process.stop()

    def _plan(self, port: int) -> LaunchPlan:
        plan = self._engine.launch(replace(self._launch, port=port, api_key=self._api_key))
        self._health_path = plan.health_path
        return plan

    async def _answers(self) -> bool:
        if self._connection is None:
            return False
        try:
            status, _ = await self._connection.request("GET", self._health_path, None, standstill.TIMEOUT_S)
        except ProcessFailed:
            return False
        return status == 200

    def _running(self) -> SupervisedProcess:
        if self._process is None:
            raise ProcessFailed(f"the {self.title} was not started.")
        return self._process
