"""Speaks to one running inference server through its engine's dialect, and knows which adapters that server holds.

Knows nothing of how the server came to be, of routes or of checkpoints. A server that was restarted is another one and
gets a connection of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from art_core import EngineCall, InferenceEngine
from art_core.engines import Endpoint
from art_core.errors import EngineRefused, ProcessFailed

JSON = dict[str, Any]
COMPLETION_TIMEOUT_S = 60.0


class EngineConnection:
    """The way to one server. For one event loop.

    `url` is the server's address without a path, `strangers` the adapters that it held before we came, which nobody
    vouches for. `evidence` gives what an error should end with, such as the end of the server's log.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        url: str,
        api_key: str,
        *,
        evidence: Callable[[], str],
    ) -> None:
        self.engine = engine
        self.url = url
        self.api_key = api_key
        self.confirmed: set[str] = set()
        self._evidence = evidence
        self.strangers: set[str] = set()
        self._used: dict[str, str] = {}
        self._http: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"EngineConnection({self.engine.name}, {self.url})"

    async def call(self, call: EngineCall) -> bytes:
        """Make a control call. Raises EngineRefused with the engine's reason, ProcessFailed when it does not answer."""
        status, body = await self.request(call.method, call.path, call.json, call.timeout_s)
        self.engine.check_answer(call, status, body)
        return body

    async def complete(self, body: JSON, adapter: str | None, endpoint: Endpoint = "completions") -> JSON:
        """Ask for a completion under an adapter's name; gives the answer in the one form. Raises as `call`."""
        request = self.engine.prepare_request(endpoint, body, adapter)
        status, answer = await self.request("POST", f"/v1/{endpoint}", request, COMPLETION_TIMEOUT_S)
        if status != 200:
            raise EngineRefused(
                self.engine.name, f"answer as {adapter}", f"HTTP {status}: {answer[:2000].decode(errors='replace')}"
            )
        with self._readable(f"answer as {adapter}"):
            return self.engine.read_response(endpoint, orjson.loads(answer))

    async def load(self, adapter: str, folder: Path, fingerprint: str) -> None:
        """Have the server hold the adapter in `folder` under the name `adapter`, and see that it lists it.

        `fingerprint` stands for the weights: a name that had others in this server is refused, since an engine may
        still remember them.
        """
        if self.held_other_weights(adapter, fingerprint):
            raise EngineRefused(
                self.engine.name, f"load {adapter}", "that name stood for other weights in this very process"
            )
        # Also what it was given before and whose answer was lost: it holds these weights under that name, or none.
        if adapter in self._used and adapter in await self.adapters():
            self.confirmed.add(adapter)
            return
        if adapter in self.strangers:
            await self.unload(adapter)
        # From here on the server may hold it, whatever becomes of the call.
        self._used[adapter] = fingerprint
        await self.call(self.engine.load_adapter(adapter, folder))
        listed = await self.adapters()
        if adapter not in listed:
            there = ", ".join(sorted(listed)) or "none"
            raise EngineRefused(
                self.engine.name, f"load {adapter}", f"it said yes but lists only these adapters: {there}"
            )
        self.confirmed.add(adapter)

    async def unload(self, adapter: str) -> None:
        """Have the server forget an adapter. One that it doesn't hold is no error."""
        self.confirmed.discard(adapter)
        try:
            await self.call(self.engine.unload_adapter(adapter))
        except EngineRefused:
            if adapter in await self.adapters():
                raise
        self.strangers.discard(adapter)

    async def unload_strangers(self, prefix: str) -> list[str]:
        """Have the server forget what an earlier host left there under names that begin with `prefix`."""
        stale = sorted(name for name in self.strangers if name.startswith(prefix))
        for adapter in stale:
            await self.unload(adapter)
        return stale

    async def adapters(self) -> frozenset[str]:
        """The adapters that the server says it holds. Raises as `call`."""
        body = await self.call(self.engine.list_adapters())
        with self._readable("list its adapters"):
            return self.engine.read_adapters(body)

    def held_other_weights(self, adapter: str, fingerprint: str | None) -> bool:
        """True when this server was given other weights under this name (None: any weights at all)."""
        used = self._used.get(adapter)
        return used is not None and used != fingerprint

    async def request(self, method: str, path: str, body: JSON | None, limit_s: float) -> tuple[int, bytes]:
        """One HTTP request: status and body. Raises ProcessFailed when there is no answer within `limit_s`."""
        if self._http is None:
            # The server may close an idle connection at any time; one for each call is never the closed one.
            self._http = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
                connector=aiohttp.TCPConnector(force_close=True),
            )
        data = None if body is None else orjson.dumps(body)
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            async with self._http.request(
                method, self.url + path, data=data, headers=headers, timeout=aiohttp.ClientTimeout(total=limit_s)
            ) as response:
                return response.status, await response.read()
        except TimeoutError:
            reason = f"did not answer {method} {path} within {limit_s:g} s"
            raise ProcessFailed(f"the inference server {self.engine.name} {reason}.{self._evidence()}") from None
        except (aiohttp.ClientError, OSError) as error:
            reason = f"broke the connection at {method} {path} ({error!r})"
            raise ProcessFailed(f"the inference server {self.engine.name} {reason}.{self._evidence()}") from error

    @contextmanager
    def _readable(self, doing: str) -> Iterator[None]:
        """What is read of an answer can't be read of one that was cut, or isn't this engine's."""
        try:
            yield
        except (ValueError, KeyError, TypeError) as error:
            reason = f"its answer can't be read ({type(error).__name__}: {error}).{self._evidence()}"
            raise EngineRefused(self.engine.name, doing, reason) from error

    async def close(self) -> None:
        """Close the connection, not the server. A second call does nothing."""
        if self._http is not None:
            await self._http.close()
