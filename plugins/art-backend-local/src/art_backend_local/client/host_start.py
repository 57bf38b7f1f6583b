"""Finds the host of a path, or starts one: the rules about who may share a host with whom.

Knows processes and `host.json`; talks to no host.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from art_core import ArtError
from art_core.errors import ProcessFailed
from art_runtime import Child, spawn_detached, spawn_tethered
from art_runtime.spawning import last_lines

from ..wire.host_files import LOCK_FILE, PATH_IN_USE, HostRecord, path_is_locked, read_host
from .backend_path import make_usable

DISTRIBUTION = "art-backend-local"
START_LIMIT_S = 60.0
# A host whose client died stops its engines first, politely.
LEAVING_LIMIT_S = 60.0
STOP_TIMEOUT_S = 45.0
_POLL_S = 0.02


class PathInUse(ArtError):
    """The path belongs to a host that this client may not share; the message names the process and what to do."""


async def find_host(
    path: Path, *, in_process: bool, own: Child | None, say: Callable[[str], None] = lambda _: None
) -> HostRecord | None:
    """The path's running host, if this client may use it. `own` is the tethered host that this client started.

    Raises PathInUse when it belongs to somebody else.
    """
    record = read_host(path)
    if record is None or not record.alive:
        return None
    if own is not None and own.poll() is None and record.owner_pid == os.getpid():
        return record
    if record.owner_pid is not None and not record.owner_alive:
        # It ends with its client, after stopping its engines.
        say(f"waiting for host process {record.pid}, whose client has ended, to stop its engines")
        await _wait_until_gone(path, record)
        return None
    if record.owner_pid is not None:
        raise PathInUse(
            f"{path} is in use by process {record.owner_pid}, whose backend runs in_process=True and ends with it (host"
            f" process {record.pid}). Use another path, wait for that process to end, or run both with"
            " in_process=False."
        )
    if in_process:
        raise PathInUse(
            f"{path} is in use by host process {record.pid}, which outlives its clients. Use in_process=False to share"
            f" it, another path, or end it first: art down --path {path}"
        )
    if record.version != version(DISTRIBUTION):
        raise PathInUse(
            f"the host of {path} (process {record.pid}) is {DISTRIBUTION} {record.version}, this client"
            f" {version(DISTRIBUTION)}. End it, and a new one starts by itself: art down --path {path}"
        )
    return record


async def start_host(
    path: Path, *, in_process: bool, idle_timeout_s: float, say: Callable[[str], None] = lambda _: None
) -> tuple[HostRecord, Child | None]:
    """Start a host and wait until it answers, which takes a second or two. `say` is told what is waited for.

    The child is None when another client started the host at the same time and it can be shared. Raises PathUnusable,
    PathInUse when the host can't be shared, ProcessFailed with the end of the log when it doesn't start.
    """
    await asyncio.to_thread(make_usable, path)
    deadline = time.monotonic() + LEAVING_LIMIT_S
    while path_is_locked(path):
        # Another client is starting one, or the last one is stopping its engines.
        say("waiting for another host, which is starting or stopping")
        record = await find_host(path, in_process=in_process, own=None)
        if record is not None:
            return record, None
        if time.monotonic() > deadline:
            raise PathInUse(
                f"{path} is held by a process that can't be seen from here, for {LEAVING_LIMIT_S:g} s now: in another"
                f" container, perhaps, or by a host that hangs (fuser {path / LOCK_FILE} names it). Use another path,"
                " or end that process."
            )
        await asyncio.sleep(_POLL_S)
    say("waiting for its first answer")
    log = path / "logs" / "host.log"
    argv = [sys.executable, "-m", "art_backend_local.host", "--path", str(path), "--idle-timeout", str(idle_timeout_s)]
    if in_process:
        child = spawn_tethered([*argv, "--owner-pid", str(os.getpid())], log_file=log, stop_timeout_s=STOP_TIMEOUT_S)
    else:
        child = spawn_detached(argv, log_file=log, stop_timeout_s=STOP_TIMEOUT_S)
    try:
        return await _await_host(path, child, log, in_process=in_process)
    except BaseException:
        child.kill()
        raise


async def _await_host(path: Path, child: Child, log: Path, *, in_process: bool) -> tuple[HostRecord, Child | None]:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        code = child.poll()
        record = read_host(path)
        if record is not None and record.alive:
            if code is None and (record.owner_pid == os.getpid() if in_process else record.pid == child.pid):
                return record, child
            if code is not None and (shared := await find_host(path, in_process=in_process, own=None)):
                return shared, None
        if code is not None and code != PATH_IN_USE:
            raise ProcessFailed(
                f"the host process of {path} ended at its start. Its log ({log}) ends:\n{last_lines(log)}"
            )
        await asyncio.sleep(_POLL_S)
    raise ProcessFailed(
        f"the host process of {path} did not answer within {START_LIMIT_S:g} s. Its log ({log})"
        f" ends:\n{last_lines(log)}"
    )


async def _wait_until_gone(path: Path, record: HostRecord) -> None:
    deadline = time.monotonic() + LEAVING_LIMIT_S
    while record.alive:
        if time.monotonic() > deadline:
            raise PathInUse(
                f"the host of {path} (process {record.pid}) still runs {LEAVING_LIMIT_S:g} s after its client ended."
                f" End it: kill -9 {record.pid}"
            )
        await asyncio.sleep(_POLL_S)
