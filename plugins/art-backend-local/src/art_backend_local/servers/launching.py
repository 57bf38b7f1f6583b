"""Starts a server from a launch plan on a port of its own, and on another one when a stranger was faster.

Between choosing a port and listening on it anyone may take it; that is no reason to fail. Knows no engine.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from art_core import LaunchPlan
from art_core.errors import ProcessFailed
from art_runtime import StartProgress, SupervisedProcess, free_port

_PORTS_TRIED = 3


async def start_server(
    plan_for: Callable[[int], LaunchPlan],
    *,
    name: str,
    log_file: Path,
    cores: Sequence[int] = (),
    on_progress: Callable[[StartProgress], None] | None = None,
) -> SupervisedProcess:
    """Run `plan_for(port)` until it is ready. Raises ProcessFailed, with the end of the log, when it can't be."""
    for remaining in reversed(range(_PORTS_TRIED)):
        port = free_port()
        try:
            return await SupervisedProcess.start(
                plan_for(port), port=port, log_file=log_file, name=name, cores=cores, on_progress=on_progress
            )
        except ProcessFailed:
            if not remaining or not _taken(port):
                raise
    raise AssertionError("the last attempt raises")


def _taken(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False
