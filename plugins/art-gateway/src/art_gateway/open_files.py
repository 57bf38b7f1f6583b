"""How many files a gateway's process may have open, and a socket that takes no more connections than these allow.

Every request in flight takes two: the client's connection and the engine's. Knows nothing of requests.
"""

from __future__ import annotations

import errno
import resource
import socket
from collections.abc import Callable
from typing import Any

# For everything that is no request: logs, event loops, connections to the host itself.
_SPARE = 64
# Where the system names no upper bound, it still has one, far above what anybody needs.
_ENOUGH = (1_048_576, 65_536, 10_240)


def raise_file_limit() -> int:
    """Let this process open as many files as the system allows it, and say how many.

    The usual limit of 1,024 is spent at some 500 requests.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in _ENOUGH if hard == resource.RLIM_INFINITY else (hard,):
        if soft != resource.RLIM_INFINITY and soft < wanted:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            except (ValueError, OSError):
                continue
            return wanted
    return soft


def requests_at_once() -> int:
    """How many requests may be in flight with the files that this process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = _ENOUGH[0]
    return (limit - min(_SPARE, limit // 4)) // 2


class Listener(socket.socket):
    """Listens on 127.0.0.1 and leaves further connections in the kernel's queue while `full()`; no client sees more of
    that than a wait.
    """

    def __init__(self, port: int = 0, *, backlog: int, full: Callable[[], bool]) -> None:
        super().__init__(fileno=socket.create_server(("127.0.0.1", port), backlog=backlog).detach())
        self._full = full

    def accept(self) -> tuple[socket.socket, Any]:
        """As a socket's. Full, it says what the kernel says: asyncio then asks again a second later."""
        if self._full():
            raise OSError(errno.EMFILE, "as many connections are open as this process may have")
        return super().accept()
