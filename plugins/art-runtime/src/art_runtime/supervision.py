"""One server process run from a launch plan: started, waited for until it is ready, watched, stopped.

Notices death at once, at start and later, and puts the end of the log into every error. Whether to start it again is
the caller's business.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from art_core import LaunchPlan
from art_core.errors import ProcessFailed

from .ports import check_port_is_ours
from .spawning import Child, last_lines, spawn_tethered

if TYPE_CHECKING:
    import aiohttp

_WATCH_INTERVAL_S = 0.05
_HEALTH_INTERVAL_S = 0.1
_HEALTH_TIMEOUT_S = 5.0
_PROGRESS_INTERVAL_S = 0.5
_STOP_MARGIN_S = 15.0


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

    @property
    def cause(self) -> str:
        """One phrase, such as "was ended by SIGKILL (often: out of memory)"."""
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        number = -self.code
        known = number in signal.Signals._value2member_map_
        hint = " (often: out of memory)" if number == signal.SIGKILL and not self.expected else ""
        return f"was ended by {signal.Signals(number).name if known else f'signal {number}'}{hint}"

    def __str__(self) -> str:
        return f"{self.name} {self.cause}. Its log ({self.log_file}) ends:\n{self.last_lines}"


class SupervisedProcess:
    """A server that answers on 127.0.0.1 and belongs to this process. Made by `start`; for one event loop."""

    def __init__(
        self,
        child: Child,
        plan: LaunchPlan,
        *,
        port: int,
        log_file: Path,
        name: str,
    ) -> None:
        self._child = child
        self._plan = plan
        self._stopping = False
        self.name, self.port, self.log_file, self.pid = name, port, log_file, child.pid
        self._watch = asyncio.create_task(self._watch_exit(), name=f"watch {name}")

    def __repr__(self) -> str:
        return f"SupervisedProcess({self.name!r}, port={self.port}, pid={self.pid}, running={self.running})"

    @classmethod
    async def start(
        cls,
        plan: LaunchPlan,
        *,
        port: int,
        log_file: Path,
        name: str = "server",
        cwd: Path | None = None,
        cores: Sequence[int] = (),
        on_progress: Callable[[StartProgress], None] | None = None,
    ) -> Self:
        """Run `plan` and wait until `GET health_path` on `port` answers 200 from a process of ours. It keeps to the CPU
        `cores` of these numbers, or to none in particular.

        `on_progress` is called about twice a second meanwhile. Raises ProcessFailed, with the end of the log, when it
        dies, when `plan.ready_timeout_s` is over, or when a stranger answers on the port; nothing is left running then,
        nor when the wait is cancelled.
        """
        env = {**plan.env, **plan.secret_env}
        child = spawn_tethered(
            plan.argv, env, log_file=log_file, cwd=cwd, stop_timeout_s=plan.stop_timeout_s, cores=cores
        )
        process = cls(child, plan, port=port, log_file=log_file, name=name)
        try:
            await process._wait_ready(on_progress)
        except BaseException:
            await process._abandon()
            raise
        return process

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:{port}`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return self._child.poll() is None

    def log_tail(self, count: int = 20) -> str:
        """The last lines of its log, without secrets."""
        return last_lines(self.log_file, count=count, secrets=tuple(self._plan.secret_env.values()))

    async def wait_exit(self) -> ProcessExit:
        """Wait until it has ended, in whatever way. Any number may wait; put a timeout around it."""
        return await asyncio.shield(self._watch)

    async def stop(self) -> ProcessExit:
        """SIGTERM to its group, after `plan.stop_timeout_s` SIGKILL to the whole tree, and how it ended.

        A second call waits with the first. Raises ProcessFailed when even SIGKILL doesn't end it.
        """
        if not self._stopping:
            self._stopping = True
            self._child.end()
        for limit_s in (self._plan.stop_timeout_s + _STOP_MARGIN_S, _STOP_MARGIN_S):
            try:
                async with asyncio.timeout(limit_s):
                    return await self.wait_exit()
            except TimeoutError:
                self._child.kill()
        raise ProcessFailed(
            f"{self.name} (process {self.pid}) doesn't end, even by SIGKILL. Its log ({self.log_file}) ends:\n"
            f"{self.log_tail()}"
        )

    def kill(self) -> None:
        """End the whole tree at once, without waiting."""
        self._stopping = True
        self._child.kill()

    async def _watch_exit(self) -> ProcessExit:
        while (code := self._child.poll()) is None:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        self._child.let_go()
        return ProcessExit(
            name=self.name, code=code, expected=self._stopping, log_file=self.log_file, last_lines=self.log_tail()
        )

    async def _wait_ready(self, on_progress: Callable[[StartProgress], None] | None) -> None:
        # Here, because a client that only starts its host has no use for it, and it takes a quarter of a second.
        import aiohttp

        began = time.monotonic()
        reported = began
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT_S)) as session:
            while not await self._answers(session):
                seconds = time.monotonic() - began
                if seconds > self._plan.ready_timeout_s:
                    raise ProcessFailed(
                        f"{self.name} wasn't ready after {self._plan.ready_timeout_s:g} s: {self._plan.health_path} on"
                        f" port {self.port} didn't answer 200. Its log ({self.log_file}) ends:\n{self.log_tail()}"
                    )
                if on_progress is not None and time.monotonic() - reported >= _PROGRESS_INTERVAL_S:
                    reported = time.monotonic()
                    on_progress(StartProgress(name=self.name, seconds=seconds, last_line=self.log_tail(1)))
                await asyncio.wait({self._watch}, timeout=_HEALTH_INTERVAL_S)
                if self._watch.done():
                    raise ProcessFailed(f"{self._watch.result()}\n({self.name} had not been ready yet.)")
        try:
            await asyncio.to_thread(check_port_is_ours, self.port, self.pid, name=self.name)
        except ProcessFailed as error:
            raise ProcessFailed(f"{error} Its log ({self.log_file}) ends:\n{self.log_tail()}") from error

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        """Whether it is healthy. The question is dropped when it ends: a stranger on the port may never answer."""
        asked = asyncio.create_task(self._healthy(session))
        try:
            await asyncio.wait({asked, self._watch}, return_when=asyncio.FIRST_COMPLETED)
            return asked.done() and asked.result()
        finally:
            asked.cancel()
            await asyncio.wait({asked})

    async def _healthy(self, session: aiohttp.ClientSession) -> bool:
        from aiohttp import ClientError

        try:
            async with session.get(f"{self.base_url}{self._plan.health_path}") as answer:
                return answer.status == 200
        except (ClientError, TimeoutError, OSError):
            return False

    async def _abandon(self) -> None:
        try:
            await self.stop()
        except asyncio.CancelledError:
            self.kill()
            raise
