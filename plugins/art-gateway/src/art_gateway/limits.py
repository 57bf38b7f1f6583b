"""How long the gateway waits, how much it takes, and how the server under it is set up for thousands of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Keyword arguments for `uvicorn.Config`. Idle connections are kept far longer than clients keep them, so that it is
#: always the client that closes one, never we while a request is on its way. The loop is asyncio's, which takes every
#: waiting connection at once: uvloop 0.23 takes one a turn, and under load the others starve for seconds.
SERVER_OPTIONS: dict[str, Any] = {
    "http": "httptools",
    "loop": "asyncio",
    "ws": "none",
    "access_log": False,
    "log_level": "warning",
    "proxy_headers": False,
    "server_header": False,
    "timeout_keep_alive": 300,
    "backlog": 16_384,
}


@dataclass(frozen=True, kw_only=True)
class GatewayLimits:
    """Sizes in bytes, times in seconds.

    `answer_s` bounds a whole answer, streaming included; `route_s` the wait for a route, as while an engine restarts;
    `request_s` the arrival of a request's body; `connect_s` the connection to an engine; `reader_s` how much longer
    than `answer_s` a client may take to read its answer. `refused_again_s` are the pauses before a server that took no
    connection is asked again, `broken_again_s` the one before a broken answer is asked for once more.
    """

    request_bytes: int = 64 * 2**20
    request_s: float = 120.0
    route_s: float = 300.0
    # A dead engine refuses at once; what takes long is only a burst of thousands on a busy machine.
    connect_s: float = 60.0
    answer_s: float = 1200.0
    reader_s: float = 60.0
    refused_again_s: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    broken_again_s: float = 0.2
