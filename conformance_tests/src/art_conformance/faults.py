"""Whose fault a failed check is where it isn't the subject's: what is not installed here, and what the machine did.

Judges by the kinds of exceptions and by what the kernel says, never by the words of an error. What it can't tell stays
the subject's own: a hang above all, which looks the same on a machine that is too slow.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import psutil

from art_runtime import SupervisedProcess
from art_runtime.environments import EnvironmentMissing

from .report import Outcome

# Files with a line "oom_kill N". A container's own where it has one, since the other counts the whole machine.
OOM_COUNTERS: Final = [Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")]
FULL_BYTES: Final = 2**20
_OF_THE_MACHINE: Final = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ENFILE)
_STARTING: Final = SupervisedProcess.start.__func__.__code__  # type: ignore[attr-defined]
_KILLED: Final = "for lack of memory the kernel ended a process while this check ran"


class PrerequisiteMissing(Exception):
    """Something that a check needs isn't installed; the message holds the command that installs it."""


@dataclass(frozen=True)
class Excuse:
    """What a failed check counts as in place of not met, and why."""

    outcome: Outcome
    reason: str


def killed_for_memory() -> int | None:
    """How many processes the kernel has ended for lack of memory so far; None where it doesn't say."""
    for counter in OOM_COUNTERS:
        try:
            words = counter.read_text(encoding="utf-8").split()
            return int(words[words.index("oom_kill") + 1])
        except (OSError, ValueError, IndexError):
            continue
    return None


def excuse_for(error: BaseException, killed_before: int | None, folder: Path) -> Excuse | None:
    """Why a check's error isn't the subject's; None when it is, or when that can't be told.

    `killed_before` is what `killed_for_memory` said when the check began, `folder` lies where the run writes.
    """
    raised = list(_causes(error))
    for each in raised:
        if isinstance(each, PrerequisiteMissing | EnvironmentMissing):
            return Excuse(Outcome.UNTESTABLE, " ".join(str(each).split()))
    reason = (
        next(filter(None, map(_of_its_kind, raised)), "")
        or _killed(error, killed_before)
        or _full(folder)
        or next(filter(None, map(_taken_port, raised)), "")
    )
    return Excuse(Outcome.MACHINE, reason) if reason else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and what a group holds. What was merely being handled is no cause."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__] if each.__cause__ is not None else []
        waiting += each.exceptions if isinstance(each, BaseExceptionGroup) else []


def _of_its_kind(error: BaseException) -> str:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE):
        return f"{type(error).__name__}: {error}".strip()
    return ""


def _killed(error: BaseException, before: int | None) -> str:
    # Noted on the error, since a fixture that failed raises it again in every check that asks for it.
    if _KILLED in getattr(error, "__notes__", ()):
        return _KILLED
    now = killed_for_memory()
    if before is None or now is None or now <= before:
        return ""
    error.add_note(_KILLED)
    return _KILLED


def _full(folder: Path) -> str:
    stat = os.statvfs(folder)
    return f"the disk of {folder} is full" if stat.f_bavail * stat.f_frsize < FULL_BYTES else ""


def _taken_port(error: BaseException) -> str:
    """Who holds the port that a process was started for and is surely none of the subject's."""
    for frame in _frames(error):
        if frame.f_code is _STARTING:
            return _stranger_on(int(frame.f_locals["port"]))
    return ""


def _frames(error: BaseException) -> Iterator[FrameType]:
    place = error.__traceback__
    while place is not None:
        yield place.tb_frame
        place = place.tb_next


def _stranger_on(port: int) -> str:
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return ""
    began = psutil.Process().create_time()
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr or connection.laddr.port != port:
            continue
        if connection.pid is None:
            return f"port {port} is taken by a process of another user"
        try:
            owner = psutil.Process(connection.pid)
            # One that began later may be the subject's, which lost it.
            if owner.create_time() < began:
                return f"port {port} is taken by process {owner.pid} ({owner.name()}), which was there before this run"
        except psutil.NoSuchProcess:
            continue
    return ""
