"""One inference engine's server process: started, spoken to through its dialect, restarted when it dies.

Knows which adapters the server holds and under which names it ever held any. Knows nothing of routes, leases or
training; whoever is served from here is told when everything was lost and loads it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from art_core import EngineCall, EngineRefused, InferenceEngine, InferenceLaunch, LaunchPlan, ProcessFailed
from art_core.engines import Endpoint
from art_runtime import ProcessExit, StartProgress, SupervisedProcess

from .launching import start_server

JSON = dict[str, Any]
RESTART_ATTEMPTS = 3
RESTART_PAUSE_S = 1.0
# A server that dies this often within the window is broken, not unlucky.
DEATHS_ALLOWED = 5
DEATH_WINDOW_S = 600.0
COMPLETION_TIMEOUT_S = 60.0
HEALTH_EVERY_S = 15.0
HEALTH_TIMEOUT_S = 20.0
SILENT_LIMIT = 4


@dataclass(frozen=True, kw_only=True)
class EngineServerConfig:
    """What one server is started with; see `InferenceLaunch`. `log_file` is appended to."""

    base_model: Path
    served_name: str
    python: str
    log_file: Path
    max_adapters: int = 8
    max_lora_rank: int = 16
    max_model_len: int | None = None
    dtype: str = "auto"
    devices: tuple[int, ...] = ()
    chat_template: Path | None = None
    engine_args: JSON = field(default_factory=dict)


class EngineServer:
    """A running inference engine. For one event loop.

    New requests wait while `gate` is not set. Whoever loads or unloads adapters holds `adapters_lock`. `report` takes a
    sentence for the user.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        config: EngineServerConfig,
        *,
        report: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.config = config
        self.api_key = secrets.token_urlsafe(24)
        self.loaded: set[str] = set()
        self.restarts = 0
        self.adapters_lock = asyncio.Lock()
        self.gate = asyncio.Event()
        self.gate.set()
        self._used: dict[str, str] = {}
        self._report = report
        self._lost: Callable[[], None] = lambda: None
        self._restore: Callable[[], Awaitable[None]] = _nothing
        self._give_up_one: Callable[[], Awaitable[bool]] = _nothing_idle
        self._process: SupervisedProcess | None = None
        self._http: aiohttp.ClientSession | None = None
        self._up = asyncio.Event()
        self._broken: ProcessFailed | None = None
        self._deaths: list[float] = []
        self._health_path = "/health"
        self._watch: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"EngineServer({self.engine.name}, base {self.config.base_model.name}, {'up' if self.up else 'down'})"

    @property
    def up(self) -> bool:
        """True while it answers and holds what must be served."""
        return self._up.is_set() and self._broken is None

    @property
    def broken(self) -> ProcessFailed | None:
        """Why it is not restarted any more; None otherwise."""
        return self._broken

    @property
    def pid(self) -> int | None:
        """The process id; None while none runs."""
        return self._process.pid if self._process is not None and self._process.running else None

    @property
    def base_url(self) -> str:
        """Where it listens; changes with a restart."""
        return self._running().base_url

    def serves(
        self,
        *,
        lost: Callable[[], None],
        restore: Callable[[], Awaitable[None]],
        give_up_one: Callable[[], Awaitable[bool]],
    ) -> None:
        """Say what depends on it: `lost` is called when it died, `restore` after each restart to load again what must
        be served, `give_up_one` to unload one idle adapter and say whether there was one.
        """
        self._lost, self._restore, self._give_up_one = lost, restore, give_up_one

    async def start(self, on_progress: Callable[[StartProgress], None] | None = None) -> None:
        """Start the server and watch over it. Raises ProcessFailed with the end of its log."""
        await self._launch(on_progress)
        self._up.set()
        self._watch = asyncio.create_task(self._watch_over(), name=f"watch {self.engine.name}")

    async def ready(self, limit_s: float) -> None:
        """Wait until it is up. Raises ProcessFailed when it is broken or not up within `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self._up.wait()
        except TimeoutError:
            raise ProcessFailed(
                f"the inference engine {self.engine.name} died and is not back after {limit_s:g} s. The end of its"
                " log:\n"
                f"{self.log_tail()}"
            ) from None
        if self._broken is not None:
            raise self._broken

    def log_tail(self) -> str:
        """The last lines of its log."""
        return self._process.log_tail() if self._process is not None else "(it was not started)"

    async def call(self, call: EngineCall) -> bytes:
        """Make a control call. Raises EngineRefused with the engine's reason, ProcessFailed when it does not answer."""
        status, body = await self._request(call.method, call.path, call.json, call.timeout_s)
        self.engine.check_answer(call, status, body)
        return body

    async def complete(self, body: JSON, adapter: str | None, endpoint: Endpoint = "completions") -> JSON:
        """Ask for a completion under an adapter's name; gives the answer in the one form."""
        request = self.engine.prepare_request(endpoint, body, adapter)
        status, answer = await self._request("POST", f"/v1/{endpoint}", request, COMPLETION_TIMEOUT_S)
        if status != 200:
            raise EngineRefused(
                self.engine.name, f"answer as {adapter}", f"HTTP {status}: {answer[:2000].decode(errors='replace')}"
            )
        return self.engine.read_response(endpoint, orjson.loads(answer))

    async def load(self, adapter: str, folder: Path, fingerprint: str) -> None:
        """Have the server hold the adapter in `folder` under the name `adapter`, and see that it lists it.

        `fingerprint` stands for the weights: a name that had others in this process is refused, since an engine may
        still remember them.
        """
        if self.held_other_weights(adapter, fingerprint):
            raise EngineRefused(
                self.engine.name, f"load {adapter}", "that name stood for other weights in this very process"
            )
        if adapter in self.loaded and adapter in await self._listed():
            return
        self._used[adapter] = fingerprint
        # From here on the server may hold it, whatever becomes of the call.
        self.loaded.add(adapter)
        await self.call(self.engine.load_adapter(adapter, folder))
        listed = await self._listed()
        if adapter not in listed:
            there = ", ".join(sorted(listed)) or "none"
            raise EngineRefused(
                self.engine.name, f"load {adapter}", f"it said yes but lists only these adapters: {there}"
            )

    async def make_room(self) -> None:
        """Unload an idle adapter when all places are taken. Raises EngineRefused when every one is in use."""
        while len(self.loaded) >= self.config.max_adapters:
            if not await self._give_up_one():
                raise EngineRefused(
                    self.engine.name,
                    "load another adapter",
                    f"all {self.config.max_adapters} places are taken by steps that are routed, leased or answering."
                    " End leases, or give LocalBackend a larger max_adapters.",
                )

    async def unload(self, adapter: str) -> None:
        """Have the server forget an adapter."""
        try:
            await self.call(self.engine.unload_adapter(adapter))
        except EngineRefused:
            if adapter in await self._listed():
                raise
        self.loaded.discard(adapter)

    async def _listed(self) -> frozenset[str]:
        return self.engine.read_adapters(await self.call(self.engine.list_adapters()))

    def held_other_weights(self, adapter: str, fingerprint: str | None) -> bool:
        """True when this process held other weights under this name (None: any weights at all)."""
        used = self._used.get(adapter)
        return used is not None and used != fingerprint

    async def close(self) -> None:
        """Stop the server. A second call does nothing."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if self._process is not None:
            await self._process.stop()
        if self._http is not None:
            await self._http.close()

    async def _launch(self, on_progress: Callable[[StartProgress], None] | None = None) -> None:
        self.loaded.clear()
        self._used.clear()
        self._process = await start_server(
            self._plan,
            name=f"inference engine {self.engine.name}",
            log_file=self.config.log_file,
            on_progress=on_progress,
        )

    def _plan(self, port: int) -> LaunchPlan:
        c = self.config
        plan = self.engine.launch(
            InferenceLaunch(
                base_model=c.base_model,
                served_name=c.served_name,
                host="127.0.0.1",
                port=port,
                api_key=self.api_key,
                python=c.python,
                max_lora_rank=c.max_lora_rank,
                max_adapters=c.max_adapters,
                max_model_len=c.max_model_len,
                dtype=c.dtype,
                devices=c.devices,
                chat_template=c.chat_template,
                engine_args=c.engine_args,
            )
        )
        self._health_path = plan.health_path
        return plan

    async def _watch_over(self) -> None:
        while True:
            exit_ = await self._death()
            self._up.clear()
            self.loaded.clear()
            self._lost()
            self._report(f"The inference engine {self.engine.name} died and is being restarted. {exit_}")
            error = await self._revive(exit_)
            if error is not None:
                self._broken = error
                self._report(str(error))
                self._up.set()
                return
            self._up.set()
            self._report(f"The inference engine {self.engine.name} is back, with the adapters that it served.")

    async def _death(self) -> ProcessExit:
        """Wait until the server has ended. One that runs but doesn't answer its health check any more is ended."""
        process, silent = self._running(), 0
        while True:
            try:
                return await asyncio.wait_for(process.wait_exit(), HEALTH_EVERY_S)
            except TimeoutError:
                silent = 0 if await self._answers() else silent + 1
            if silent == SILENT_LIMIT:
                self._report(
                    f"The inference engine {self.engine.name} runs but has not answered for"
                    f" {SILENT_LIMIT * (HEALTH_EVERY_S + HEALTH_TIMEOUT_S):g} s, so it is ended."
                )
                process.kill()

    async def _answers(self) -> bool:
        try:
            status, _ = await self._request("GET", self._health_path, None, HEALTH_TIMEOUT_S)
        except ProcessFailed:
            return False
        return status == 200

    async def _revive(self, exit_: ProcessExit) -> ProcessFailed | None:
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < DEATH_WINDOW_S] + [now]
        if len(self._deaths) > DEATHS_ALLOWED:
            return ProcessFailed(
                f"the inference engine {self.engine.name} died {len(self._deaths)} times within {DEATH_WINDOW_S:g} s"
                f" and is not restarted again. Mend the cause and register the model again. {exit_}"
            )
        cause: Exception | None = None
        for attempt in range(RESTART_ATTEMPTS):
            await asyncio.sleep(RESTART_PAUSE_S * attempt)
            try:
                await self._launch()
                self.restarts += 1
                await self._restore()
            except Exception as error:
                cause = error
                self._lost()
                with contextlib.suppress(ProcessFailed):
                    await self._running().stop()
            else:
                return None
        return ProcessFailed(
            f"the inference engine {self.engine.name} died and could not be started again in {RESTART_ATTEMPTS}"
            f" attempts. Mend the cause and register the model again. The last attempt: {cause}"
        )

    def _running(self) -> SupervisedProcess:
        if self._process is None:
            raise ProcessFailed(f"the inference engine {self.engine.name} was not started.")
        return self._process

    async def _request(self, method: str, path: str, body: JSON | None, limit_s: float) -> tuple[int, bytes]:
        if self._http is None:
            self._http = aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.api_key}"})
        data = None if body is None else orjson.dumps(body)
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            async with self._http.request(
                method, self.base_url + path, data=data, headers=headers, timeout=aiohttp.ClientTimeout(total=limit_s)
            ) as response:
                return response.status, await response.read()
        except TimeoutError:
            raise ProcessFailed(
                f"the inference engine {self.engine.name} did not answer {method} {path} within {limit_s:g} s. The end"
                f" of its log:\n{self.log_tail()}"
            ) from None
        except aiohttp.ClientError as error:
            raise ProcessFailed(
                f"the inference engine {self.engine.name} broke the connection at {method} {path} ({error!r}). The end"
                f" of its log:\n{self.log_tail()}"
            ) from error


async def _nothing() -> None:
    return None


async def _nothing_idle() -> bool:
    return False
