"""An inference server that the user runs: found, probed, watched, never started, paused or ended by us.

What it must have been started with is on its engine's card; when something is missing the errors here repeat it.
"""

from __future__ import annotations

import asyncio

from art_core import ArtError, InferenceEngine
from art_core.errors import EngineRefused, ProcessFailed, ServerUnusable

from .engine_connection import EngineConnection
from .inference_server import OnProgress

PROBE_TIMEOUT_S = 10.0
LOOK_EVERY_S = 1.0
# A busy server may be slow to answer once; one that refuses connections is gone at once.
SILENT_LIMIT = 5
BACK_LIMIT_S = 60.0


class AttachedServer:
    """See `InferenceServer`. `how_to_start` is the engine card's sentence on what such a server needs."""

    def __init__(self, engine: InferenceEngine, url: str, api_key: str, *, base_model: str, how_to_start: str) -> None:
        self.title = f"{engine.name} server at {url}"
        self._engine = engine
        self._url = url
        self._api_key = api_key
        self._base_model = base_model
        self._how_to_start = how_to_start
        self._connection: EngineConnection | None = None
        self._given_up = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """None: the process is the user's."""
        return None

    async def start(self, _: OnProgress | None = None) -> EngineConnection:
        """Look whether it is there and takes our key. Raises ServerUnusable saying what is missing."""
        await self.close()
        self._given_up.clear()
        connection = EngineConnection(self._engine, self._url, self._api_key, evidence=self._evidence)
        try:
            connection.strangers |= await self._adapters_of(connection)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        return connection

    async def _adapters_of(self, connection: EngineConnection) -> frozenset[str]:
        call = self._engine.list_adapters()
        try:
            status, body = await connection.request(call.method, call.path, call.json, PROBE_TIMEOUT_S)
        except ProcessFailed as error:
            raise self.unusable(f"it does not answer: {error}") from error
        if status in (401, 403):
            given = "the key that it was given" if self._api_key else "a request without a key"
            raise self.unusable(f"it refuses {given} (HTTP {status}). Give LocalBackend its inference_api_key")
        try:
            self._engine.check_answer(call, status, body)
            return self._engine.read_adapters(body)
        except EngineRefused as error:
            raise self.unusable(str(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise self.unusable(f"its answer to GET {call.path} is not that of engine {self._engine.name}") from error

    async def start_again(self) -> EngineConnection:
        """Wait until it answers again. Raises ProcessFailed when that takes long; ask again then."""
        try:
            async with asyncio.timeout(BACK_LIMIT_S):
                while True:
                    try:
                        return await self.start()
                    except ServerUnusable:
                        await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            raise ProcessFailed(f"the {self.title} does not answer") from None

    async def gone(self) -> str:
        """Wait until it refuses connections, says nothing for long, or no longer holds what it was given."""
        return f"The {self.title} was lost and is asked for again every {LOOK_EVERY_S:g} s. {await self._lost_why()}"

    async def _lost_why(self) -> str:
        connection, silent = self._connection, 0
        assert connection is not None, "a server is watched once it is there"
        while silent < SILENT_LIMIT:
            try:
                await asyncio.wait_for(self._given_up.wait(), LOOK_EVERY_S)
                return "It did not do what it was asked."
            except TimeoutError:
                expected = set(connection.confirmed)
            try:
                there = await connection.adapters()
            except ArtError as error:
                silent += 1
                if isinstance(error.__cause__, OSError):
                    return str(error)
                continue
            silent = 0
            lost = sorted((expected & connection.confirmed) - there)
            if lost:
                return f"It no longer holds {', '.join(lost)}: it was restarted, or somebody unloaded them."
        return f"It has not answered {SILENT_LIMIT} times in a row."

    def give_up(self) -> None:
        """Have `gone` end."""
        self._given_up.set()

    async def close(self) -> None:
        """Close the connection. The server stays."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def unusable(self, reason: str) -> ServerUnusable:
        """The error that says so, and how such a server must have been started."""
        return ServerUnusable(
            f"the {self.title} can't be used for {self._base_model}: {reason.rstrip('. ')}. {self._how_to_start}"
        )

    def _evidence(self) -> str:
        return f" It is a server of yours ({self._url}); its log says more."
