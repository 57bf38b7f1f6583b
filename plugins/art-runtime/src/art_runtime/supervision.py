"""One server process run from a launch plan: started, waited for until it is ready, watched, stopped.

Notices death at once, at start and later, and puts the end of the log into every error. Whether to start it again is
the caller's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp
from art_core import LaunchPlan, ProcessFailed

from .ports import check_port_is_ours
from .spawning import Child, last_lines, spawn_detached, spawn_tethered


@dataclass(frozen=True, kw_only=True)
class StartProgress:
    """Where a start stands: seconds since it began, and the last line of the log."""

    name: str
    seconds: float
    last_line: str


@dataclass(frozen=True, kw_only=True)
class ProcessExit:
    """How a process ended. `code` is minus the signal's number when a signal ended it; `expected` after `stop`."""

    name: str
    code: int
    expected: bool
    log_file: Path
    last_lines: str

    def __str__(self) -> str:
        raise NotImplementedError


class SupervisedProcess:
    """A server that answers on 127.0.0.1 and belongs to this process. Made by `start`; for one event loop."""

    name: str
    pid: int
    port: int
    log_file: Path

    @classmethod
    async def start(
        cls,
        plan: LaunchPlan,
        *,
        port: int,
        log_file: Path,
        name: str = "server",
        cwd: Path | None = None,
        on_progress: Callable[[StartProgress], None] | None = None,
        on_exit: Callable[[ProcessExit], None] | None = None,
    ) -> Self:
        """Run `plan` and wait until `GET health_path` on `port` answers 200 from a process of ours.

        `on_progress` is called about twice a second meanwhile; `on_exit` once, when it has ended, whoever ended it.
        Raises ProcessFailed, with the end of the log, when it dies, when `plan.ready_timeout_s` is over, or when a
        stranger answers on the port; nothing is left running then, nor when the wait is cancelled.
        """
        raise NotImplementedError

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:{port}`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """False once it has ended."""
        raise NotImplementedError

    def log_tail(self, count: int = 20) -> str:
        """The last lines of its log, without secrets."""
        raise NotImplementedError

    async def wait_exit(self) -> ProcessExit:
        """Wait until it has ended, in whatever way. Any number may wait; put a timeout around it."""
        raise NotImplementedError

    async def stop(self) -> ProcessExit:
        """SIGTERM to its group, after `plan.stop_timeout_s` SIGKILL to the whole tree. A second call waits with the
        first.
        """
        raise NotImplementedError

    def kill(self) -> None:
        """End the whole tree at once, without waiting."""
        raise NotImplementedError
