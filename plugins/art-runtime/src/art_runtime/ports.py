"""Ports on the loopback interface: finding one that is free, and making sure who answers on it.

Between finding a port and listening on it anyone may take it, so a server is trusted only after its socket was seen to
belong to the process tree that we started.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

import psutil

from art_core.errors import ProcessFailed

_LOWEST = 15_000
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on at 127.0.0.1, never given twice by this process.

    It lies below the range from which the kernel takes ports for outgoing connections, so that a busy client of ours
    can't take it before its server is up.
    """
    below = _first_outgoing_port()
    for port in random.sample(range(_LOWEST, below), 200) if below - _LOWEST >= 1000 else ():
        if port not in _given and _can_bind(port):
            _given.add(port)
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port_is_ours(port: int, root_pid: int, *, name: str = "the server") -> None:
    """Raise ProcessFailed unless a process in the tree under `root_pid` listens on `port`; it says who does."""
    ours: set[int] = {root_pid}
    with contextlib.suppress(psutil.NoSuchProcess):
        ours.update(child.pid for child in psutil.Process(root_pid).children(recursive=True))
    for pid in ours:
        # A process that left in between, or that the system hides, can't show that the port is ours.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(_listens(c, port) for c in psutil.Process(pid).net_connections(kind="tcp")):
                return
    raise ProcessFailed(
        f"port {port} answers, but not from {name} (process {root_pid}): {_owner(port)} listens there. Start again, so"
        " that another port is chosen, or end the other process."
    )


def _first_outgoing_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _listens(connection: object, port: int) -> bool:
    address = getattr(connection, "laddr", None)
    return getattr(connection, "status", "") == psutil.CONN_LISTEN and bool(address) and address.port == port  # type: ignore[union-attr]


def _owner(port: int) -> str:
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return "a process that this user may not see"
    for connection in connections:
        if _listens(connection, port):
            if connection.pid is None:
                return "a process of another user"
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
            return f"process {connection.pid}"
    return "a process that has left since"
