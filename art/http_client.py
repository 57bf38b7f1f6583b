"""The HTTP client under an OpenAI client: connections of each event loop's own, no proxy on the way to this machine, no
more connections than files may be open.

Whoever holds one may use it on any event loop, one after another or at once; what a loop opened is closed when it ends.
Knows the HTTP package that openai is built on, httpx for 2.x and httpx2 for 3.x; knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import sys
import urllib.request
import weakref
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import SplitResult, urlsplit

import openai

from .keep_alive import KeepAlivePool
from .open_files import file_limit, files_to_spare, open_files, raise_file_limit, room_for_a_file

MAX_CONNECTIONS = 100_000
FEWEST_CONNECTIONS = 8
IDLE_CONNECTION_S = 15.0
_LOOK_AGAIN_S = 0.05
# What this version of openai is built on.
httpx: Any = sys.modules[
    next(kind for kind in openai.DefaultAioHttpClient.__mro__ if kind.__name__ == "AsyncClient").__module__.split(".")[
        0
    ]
]


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine itself, as seen without asking anybody."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_proxied(address: SplitResult) -> bool:
    """Whether the environment names a proxy for this address. A proxy is never asked for this machine itself."""
    host = address.hostname or ""
    proxies = urllib.request.getproxies()
    return not is_loopback(host) and (
        bool(proxies.keys() & {address.scheme, "all"}) and not urllib.request.proxy_bypass(host)
    )


class AnyLoopClient(openai.DefaultAioHttpClient):
    """What an OpenAI client and its copies (`with_options`) share. It holds no connection itself, its loops do."""

    def __init__(self) -> None:
        # Its own transport is never asked; loading certificates for it would take a tenth of a second.
        super().__init__(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), trust_env=False)
        raise_file_limit()
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _OfLoop] = weakref.WeakKeyDictionary()

    async def of_loop(self) -> _OfLoop:
        """The connections of the running event loop. Raises RuntimeError once this is closed."""
        if self.is_closed:
            raise RuntimeError("this client has been closed; ask the model for another: model.openai_client()")
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None:
            found = self._loops[loop] = _OfLoop()
            await found.belong_to_loop()
        return found

    async def send(self, request: Any, **options: Any) -> Any:
        """Send a request over the running loop's connections."""
        return await (await self.of_loop()).send(request, **options)

    async def aclose(self) -> None:
        """Close what the running loop opened. Other loops close theirs when they end."""
        found = self._loops.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found.aclose()
        await super().aclose()


class _OfLoop:
    """The connections of one event loop: our own, and those of the package for what only it can do."""

    def __init__(self) -> None:
        # Requests beyond these wait for a connection; so do our own, by looking how many files are open.
        most = min(MAX_CONNECTIONS, max(FEWEST_CONNECTIONS, file_limit() - files_to_spare(file_limit()) - open_files()))
        self._limits = httpx.Limits(
            max_connections=most, max_keepalive_connections=most, keepalive_expiry=IDLE_CONNECTION_S
        )
        self._pools: dict[str, KeepAlivePool | None] = {}
        self._clients: dict[tuple[str, bool], Any] = {}
        self._closer: AsyncGenerator[None] | None = None

    def pool(self, base_url: str) -> KeepAlivePool | None:
        """Our connections to a server; None when a proxy stands between, which is the package's affair."""
        address = urlsplit(base_url)
        server = f"{address.scheme}://{address.netloc}"
        if server not in self._pools:
            tls: ssl.SSLContext | None = httpx.create_ssl_context() if address.scheme == "https" else None
            self._pools[server] = (
                None if is_proxied(address) else KeepAlivePool(address, tls=tls, idle_s=IDLE_CONNECTION_S)
            )
        return self._pools[server]

    async def send(self, request: Any, **options: Any) -> Any:
        """Send a request as the package would, once there is room for its connection."""
        while not room_for_a_file(file_limit()):
            freed = any(pool is not None and pool.give_up_idle() for pool in self._pools.values())
            await asyncio.sleep(0 if freed else _LOOK_AGAIN_S)
        return await self._client(request.url).send(request, **options)

    def _client(self, url: Any) -> Any:
        kind = (url.scheme, is_loopback(url.host))
        if kind not in self._clients:
            # Loading the certificates takes a tenth of a second, for which a plain http address has no use.
            verify = httpx.create_ssl_context() if url.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._clients[kind] = openai.DefaultAioHttpClient(limits=self._limits, verify=verify, trust_env=not kind[1])
        return self._clients[kind]

    async def belong_to_loop(self) -> None:
        """Have the running event loop close this when it ends, as it does with its asynchronous generators."""
        self._closer = self._close_at_end()
        await anext(self._closer)

    async def _close_at_end(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        for pool in self._pools.values():
            if pool is not None:
                pool.close()
        for client in self._clients.values():
            await client.aclose()
